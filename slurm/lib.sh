# shellcheck shell=bash
# What the batch scripts of this folder share. Slurm runs a copy of a script from a folder of its own, so each finds
# this file through the checkout (ORTHANT_HOME, or the folder where it was submitted) and sources it.
#
# Environment at submission, of every script
#   ORTHANT_HOME         the checkout; its .venv/bin/python does the work; by default the folder where you submit
#   ORTHANT_PYTHON       another interpreter that has the dependencies, e.g. of a conda environment
#   ORTHANT_CONTAINER    an image for pyxis/enroot: the work runs in it, with its python3 (or ORTHANT_PYTHON)
#   ORTHANT_MOUNTS       what the container sees besides ORTHANT_HOME and the folder of submission: SRC:DST[,SRC:DST]
#   ORTHANT_REQUEUE      0: a job ends where it would be requeued
#   ORTHANT_MAX_FAULTS   a request to save (USR1) in the first ten minutes requeues the job, so many times in a row; 5 by
#                        default. So does a fault of ranks (exit code 75, or ended by a signal), and ranks that Slurm
#                        asked to stop, and not the job (75 as well)
# of the scripts that run ranks (run_ranks)
#   ORTHANT_LAUNCHER     srun (default): one task is one rank. torchrun: one torchrun on each node starts its ranks
#   ORTHANT_LOGS         where each rank's log goes: NODE-RANK.log; by default logs/JOBID where you submit
#   ORTHANT_MASTER_PORT  where ranks meet on the first node; by default a port that follows from the job's number
#   ORTHANT_INTERFACE    the network interface that ranks talk over (eth0, ib0 ...), the same on all nodes; sets
#                        GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where they are not set. Without it gloo takes the
#                        one that a node's own name leads to, and where that is 127.0.1.1, as Debian sets it up, the
#                        one that leads to the second node; NCCL chooses by itself
#   OMP_NUM_THREADS      threads of a rank; by default its CPUs
#   Whatever else is set (NCCL_DEBUG, NCCL_IB_HCA, WANDB_*, HF_HOME ...) reaches the work as it is.

: "${home:?the script that sources this sets it}"

say() {
    printf '%(%F %T)T  %s\n' -1 "$*"
}

refuse() {
    printf '%s\n' "$@" >&2
    exit 2
}

# prepare: the interpreter and, where an image is asked for, srun's options for it.
# Reads home. Sets python, container, cpus (of a task).
prepare() {
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is not a Slurm job" "  cure: sbatch $0 ..."
    if [[ -n ${ORTHANT_CONTAINER:-} ]]; then
        python=${ORTHANT_PYTHON:-python3}
        local mounts=$home:$home
        [[ $PWD == "$home" ]] || mounts+=,$PWD:$PWD
        mounts+=${ORTHANT_MOUNTS:+,$ORTHANT_MOUNTS}
        container=("--container-image=$ORTHANT_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    else
        python=${ORTHANT_PYTHON:-$home/.venv/bin/python}
        container=()
        if ! type -P "$python" >/dev/null; then
            refuse "$python is not there on $(hostname)" "  cure: run \`make env\` in $home, or export ORTHANT_PYTHON"
        fi
    fi
    cpus=${SLURM_CPUS_PER_TASK:-1}
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONSAFEPATH=1 # a data.py in the working folder must not shadow ours
    export PYTHONUNBUFFERED=1
}

# Signals and requeueing

asked=""     # the signal that asked the job to stop, USR1 or TERM
deliveries=0 # of signals so far: each one cuts a `wait` short
passed=""    # what is sent on to the step
step=""      # the process of srun
errors=2     # where its errors go

# shellcheck disable=SC2317 # traps call it
ask_to_stop() {
    asked=$1
    deliveries=$((deliveries + 1))
    say "$1: the work is asked to stop"
    pass_on
}

pass_on() {
    # Where the step has ended, there is nobody to ask.
    [[ -z $step ]] || kill "-$passed" "$step" 2>/dev/null || true
}

listen() {
    trap 'ask_to_stop USR1' USR1
    trap 'ask_to_stop TERM' TERM
}

# run_step SIGNAL COMMAND...: runs a step and waits for it; a signal to the job reaches it as SIGNAL. Sets code.
run_step() {
    local before
    passed=$1
    "${@:2}" 2>&"$errors" &
    step=$!
    [[ -z $asked ]] || pass_on # came before there was anybody to ask
    while true; do
        before=$deliveries code=0
        wait "$step" || code=$?
        ((deliveries == before)) && break
    done
    trap - TERM
    trap '' USR1 # what it asks for has happened, and it would end this script before that has requeued the job
}

# run_tasks SIGNAL COMMAND...: as run_step, of several tasks that write to files of their own. Sets code to that of the
# task that ended first: srun's own is the highest, where tasks that it ended itself because of the first have 143.
run_tasks() {
    local report=$logs/srun.log tee
    exec {errors}> >(tee "$report" >&2)
    tee=$!
    run_step "$@"
    exec {errors}>&-
    wait "$tee" || true
    if [[ $(<"$report") =~ :\ tasks?\ [0-9,-]+:\ (Exited\ with\ exit\ code\ ([0-9]+))? ]]; then
        code=${BASH_REMATCH[2]:-$code}
    fi
}

# requeues: whether the job is to go on in another life.
requeues() {
    local job
    # 2: the request is wrong, and would be again.
    ((code != 2)) && [[ ${ORTHANT_REQUEUE:-1} != 0 && $asked != TERM ]] || return 1
    # A time limit that is over before anything is done would requeue the job for ever.
    [[ $asked == USR1 ]] && { in_a_row; return; }
    job=$(ask_slurm scontrol --oneliner show job "$SLURM_JOB_ID") || return 1
    # Slurm sends the tasks of a job that it preempts TERM when its time of grace begins, and the batch script nothing.
    [[ $job =~ \ PreemptTime=([^ ]+) && ${BASH_REMATCH[1]} != None ]] && return
    [[ $job == *" JobState=RUNNING "* ]] && faulty # and not cancelled
}

# ask_slurm COMMAND...: what scontrol or squeue answers. A controller that does not answer, because it restarts, is asked
# again for as long as its nodes usually wait for it.
ask_slurm() {
    local answer try
    for try in {1..150}; do
        if answer=$("$@" 2>&1); then
            [[ -z $answer ]] || printf '%s\n' "$answer"
            return
        fi
        [[ $answer == *"Unable to contact"* || $answer == *"timed out"* ]] || break
        ((try > 1)) || say "Slurm's controller does not answer: asked again for five minutes" >&2
        sleep 2
    done
    say "$1: $answer" >&2
    return 1
}

# faulty: whether ranks ended by a fault of a node, a process or the network (75, or a signal), and not too often in a
# row.
faulty() {
    [[ -n ${logs:-} ]] && ((code == 75 || code > 128)) && in_a_row
}

# in_a_row: counts a life that ended early; false where there were too many in a row. A life of ten minutes ends a row.
# The count lies beside the ranks' logs, and where there are none in the folder that they would have by default, which is
# this job's own; where it cannot be kept, every life of the job counts.
in_a_row() {
    local count=0 folder=${logs:-$SLURM_SUBMIT_DIR/logs/$SLURM_JOB_ID}
    ((SECONDS >= 600)) || read -r count 2>/dev/null <"$folder/faults" || true
    mkdir -p "$folder" && printf '%d\n' "$((count + 1))" >"$folder/faults" || count=${SLURM_RESTART_COUNT:-0}
    ((count < ${ORTHANT_MAX_FAULTS:-5})) || { say "that was fault $((count + 1)) in a row" && return 1; }
}

# end_job: ends with the step's exit code, requeued where its time was over or its nodes are wanted, and work is left.
end_job() {
    local task=$SLURM_JOB_ID
    ((code != 0)) || { say "done" && exit 0; }
    say "ended with exit code $code"
    if requeues; then
        say "requeueing"
        # The number of one task of an array may be that of the whole array.
        [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        trap '' TERM # which Slurm sends with the requeue
        ask_slurm scontrol requeue "$task" || say "Slurm does not requeue it: submit again, it goes on from what is done"
        leave_out_bad_nodes
    fi
    exit "$code"
}

# leave_out_bad_nodes: those that the pre-flight check named, one a line; they stay left out in later lives of the job,
# of every component of a heterogeneous one. So do those that were excluded at submission.
# Slurm takes that for a job that waits, so after it is requeued, and before Slurm ends this script.
leave_out_bad_nodes() {
    local names="" before try job jobs=("$SLURM_JOB_ID")
    [[ -s ${ORTHANT_BAD_NODES:-} ]] || return 0
    names=$(paste -sd, "$ORTHANT_BAD_NODES")
    for ((try = 1; try < ${components:-0}; try++)); do
        job=SLURM_JOB_ID_HET_GROUP_$try
        jobs+=("${!job}")
    done
    for job in "${jobs[@]}"; do
        before=""
        for try in {1..20}; do
            [[ $(scontrol --oneliner show job "$job" 2>/dev/null) =~ \ ExcNodeList=([^ ]+) ]] && before=${BASH_REMATCH[1]},
            if scontrol update "JobId=$job" "ExcNodeList=${before#"(null),"}$names" 2>/dev/null; then
                say "without $names (try $try)"
                break
            fi
            sleep 0.25
        done
    done
}

# Ranks

# run_ranks COMMAND CONFIG [section.key=value ...]: an orthant command as the ranks of this job. Does not return.
run_ranks() {
    local script=${1/#train/pretrain}.sbatch
    listen
    (($# >= 2)) || refuse "no configuration given" "  cure: sbatch slurm/$script CONFIG.yaml [section.key=value ...]"
    if [[ ! -f $2 ]]; then
        refuse "$2 does not exist on $(hostname)" "  where: $PWD" \
            "  cure: submit in the folder that the path starts from, on a file system that all nodes share"
    fi
    prepare

    # Left over in the shell that submitted, these would pass for a world that torchrun announces,
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK
    # and these, where it was a job's or an interactive step's, for srun's options: its memory and its CPUs.
    unset SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
    [[ -z ${SLURM_CPU_BIND_LIST:-} ]] || unset "${!SLURM_CPU_BIND@}" # a person's own SLURM_CPU_BIND comes without it
    find_nodes
    MASTER_ADDR=${nodes[0]}
    # Below 32768, where the kernel begins to hand out ports by itself; jobs that share a node get different ones.
    MASTER_PORT=${ORTHANT_MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
    local threads=${OMP_NUM_THREADS:-}
    export OMP_NUM_THREADS=${threads:-$cpus}
    choose_interface

    logs=${ORTHANT_LOGS:-$SLURM_SUBMIT_DIR/logs/$SLURM_JOB_ID}
    if ! mkdir -p "$logs" || [[ ! -w $logs ]]; then
        refuse "$logs, where ranks' logs go, cannot be written on $(hostname)" \
            "  cure: submit in a folder that can be, or export ORTHANT_LOGS"
    fi
    export ORTHANT_BAD_NODES=$logs/bad_nodes
    ((${#container[@]} == 0)) || container[1]+=,$logs:$logs # ranks write there as well
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks on $node_list," \
        "meeting at $MASTER_ADDR:$MASTER_PORT, logs in $logs"

    local arguments=(
        --distribution=block # neighbours in rank, which tensor parallelism joins, on one node
        --kill-on-bad-exit=1 # a rank that died would leave the others waiting for it
        --export=ALL         # also where the job was submitted with --export=NAMES
        --open-mode=append   # a requeued job writes on in the same files
    )
    take_a_new_step
    if ((components > 0)); then
        run_components "$@"
    else
        run_component "$@"
    fi
    ((code == 0)) || say "what each rank said is in $logs"
    end_job
}

# run_component COMMAND...: the ranks of a job that is not heterogeneous. Reads run_ranks' arguments. Sets code.
# srun hands USR1 to every task, while TERM would make it end them.
run_component() {
    case ${ORTHANT_LAUNCHER:-srun} in
        srun)
            # Since Slurm 22.05 a step does not inherit its CPUs. Node and rank name the log; stderr goes there too.
            arguments+=("--cpus-per-task=$cpus" "--output=${logs//%/%%}/%N-%t.log")
            run_tasks USR1 srun "${arguments[@]}" "${container[@]}" "$python" -m launch "$@"
            ;;
        torchrun)
            local each=${SLURM_NTASKS_PER_NODE:-}
            [[ $each =~ ^[0-9]+$ ]] || refuse "the ranks of a node are not counted" "  cure: --ntasks-per-node=8"
            arguments+=("--nodes=${#nodes[@]}" "--ntasks=${#nodes[@]}" --ntasks-per-node=1)
            arguments+=("--cpus-per-task=$((cpus * each))" "--output=${logs//%/%%}/%N-torchrun.log")
            run_tasks USR1 srun "${arguments[@]}" "${container[@]}" "$python" -m launch.torchrun "$each" "$logs" "$@"
            ;;
        *) refuse "ORTHANT_LAUNCHER=$ORTHANT_LAUNCHER is no launcher" "  cure: srun, or torchrun" ;;
    esac
}

# run_components COMMAND...: the ranks of a heterogeneous job, one step through all its components; as run_component.
# Reads threads of a rank where they are set.
run_components() {
    local words=() group each
    [[ ${ORTHANT_LAUNCHER:-srun} == srun ]] || refuse "torchrun takes as many ranks on every node" \
        "  cure: ORTHANT_LAUNCHER=srun for a heterogeneous job, or a job of one component"
    arguments+=("--output=${logs//%/%%}/%N-start.log") # ranks write NODE-RANK.log themselves: %t miscounts here
    for ((group = 0; group < components; group++)); do
        each=SLURM_CPUS_PER_TASK_HET_GROUP_$group
        ((group == 0)) || words+=(:)
        words+=("${arguments[@]}" "--het-group=$group" "--cpus-per-task=${!each:-1}" "${container[@]}")
        words+=(env "OMP_NUM_THREADS=${threads:-${!each:-1}}" "$python" -m launch.logged_rank "$logs" "$@")
    done
    run_tasks USR1 srun "${words[@]}"
}

# take_a_new_step: a life's ranks run in a step of another number than those of the lives before. Slurm counts steps from
# 0 in each life, and what it could not tell a node that failed (that the step is to end) it tells that node every minute
# until it answers: the ranks of the next life, if they are the step of that number.
take_a_new_step() {
    local number
    for ((number = ${SLURM_RESTART_COUNT:-0} % 10; number > 0; number--)); do
        srun --nodes=1 --ntasks=1 --cpus-per-task=1 true >/dev/null 2>&1 || true
    done
}

# find_nodes: those of the job, through all components of a heterogeneous one. Sets nodes, node_list, ranks, components
# (how many; 0 for a job that is not heterogeneous).
find_nodes() {
    local group list count
    components=${SLURM_HET_SIZE:-0} ranks=${SLURM_NTASKS:-?} node_list=$SLURM_JOB_NODELIST nodes=()
    if ((components == 0)); then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        return
    fi
    ranks=0 node_list=""
    for ((group = 0; group < components; group++)); do
        list=SLURM_JOB_NODELIST_HET_GROUP_$group count=SLURM_NTASKS_HET_GROUP_$group
        node_list+=${node_list:+,}${!list}
        ranks=$((ranks + ${!count}))
        mapfile -t -O "${#nodes[@]}" nodes < <(scontrol show hostnames "${!list}")
    done
}

# choose_interface: what gloo and NCCL talk over. Reads nodes.
choose_interface() {
    local address="" other="" answer=""
    if [[ -n ${ORTHANT_INTERFACE:-} ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$ORTHANT_INTERFACE}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$ORTHANT_INTERFACE}
    fi
    if ((${#nodes[@]} == 1)) || [[ -n ${GLOO_SOCKET_IFNAME:-} ]]; then
        return
    fi
    read -r address _ < <(getent ahostsv4 "${nodes[0]}") || true
    [[ $address == 127.* ]] || return 0
    read -r other _ < <(getent ahostsv4 "${nodes[1]}") || true
    answer=$(ip -oneline route get "${other:-unknown}" 2>/dev/null) || true
    if [[ ! $answer =~ \ dev\ ([^ ]+) ]]; then
        refuse "on ${nodes[0]} its own name leads to $address, where no other node reaches it" \
            "  cure: export ORTHANT_INTERFACE=eth0, or what the interface between the nodes is called"
    fi
    export GLOO_SOCKET_IFNAME=${BASH_REMATCH[1]}
    say "${nodes[0]} is $address to itself: gloo takes $GLOO_SOCKET_IFNAME, which leads to ${nodes[1]}"
}

# One task, and arrays of them

# run_one COMMAND...: an orthant command as the one task of this job, which goes on from what is done when it is run
# again. Does not return.
run_one() {
    run_step TERM srun --ntasks=1 "--cpus-per-task=$cpus" --export=ALL "${container[@]}" "$python" -m launch "$@"
    end_job
}

# array_place: which share of the work is this task's. Sets index, from 0; SLURM_ARRAY_TASK_COUNT is how many.
array_place() {
    [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] || refuse "not a job array" "  cure: sbatch --array=0-7 ..."
    local stride=${SLURM_ARRAY_TASK_STEP:-1}
    index=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / stride))
    if (((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / stride + 1 != SLURM_ARRAY_TASK_COUNT)); then
        refuse "the array has gaps: some shares of the work would not be done" "  cure: --array=0-7"
    fi
}

# submits_next SCRIPT: whether this task is the one that submits SCRIPT as what follows: the first of the array, and in a
# later life only where no earlier one came that far.
submits_next() {
    local queue dependencies command
    ((index == 0)) && [[ ${ORTHANT_CHAIN:-1} != 0 ]] || return 1
    ((${SLURM_RESTART_COUNT:-0} > 0)) || return 0
    # What follows cannot begin before this task has ended, so it is in the queue if it was submitted.
    if ! queue=$(ask_slurm squeue --me --all --noheader --format="%E|%o"); then
        say "whether what follows was submitted cannot be asked: submit the same again, it goes on from what is done" >&2
        exit 1
    fi
    while IFS='|' read -r dependencies command; do
        [[ $dependencies =~ :"$SLURM_ARRAY_JOB_ID"[_\(] && $command == *"/slurm/$1"* ]] && return 1
    done <<<"$queue"
    return 0
}

# submit_next WHAT ARRAY SCRIPT ARGUMENTS...: submits the array that starts when every task of this one has ended well.
# Partition, account, quality of service, time, memory and CPUs are those of this one; ORTHANT_SBATCH has more.
submit_next() {
    local what=$1 array=$2 script=$3 options number
    options=(
        "--dependency=afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes --parsable "--array=$array"
        "--partition=$SLURM_JOB_PARTITION" "--cpus-per-task=$cpus" "--job-name=$SLURM_JOB_NAME" "--chdir=$PWD"
        "--time=$(ask_slurm squeue --noheader --job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" --format=%l)"
    )
    [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || options+=("--account=$SLURM_JOB_ACCOUNT")
    [[ -z ${SLURM_JOB_QOS:-} ]] || options+=("--qos=$SLURM_JOB_QOS")
    [[ -z ${SLURM_MEM_PER_NODE:-} ]] || options+=("--mem=$SLURM_MEM_PER_NODE")
    [[ -z ${SLURM_MEM_PER_CPU:-} ]] || options+=("--mem-per-cpu=$SLURM_MEM_PER_CPU")
    # shellcheck disable=SC2206 # several options in one variable
    options+=(${ORTHANT_SBATCH:-})
    number=$(submit "${options[@]}" "$home/slurm/$script" "${@:4}")
    say "$what follows as job ${number%%;*}"
}

# submit OPTIONS... SCRIPT ARGUMENTS...: sbatch's answer. What Slurm told this job about itself stays here: the next one
# would take it for its own where Slurm tells it nothing (its memory, where it asked for all of it), and so would srun.
submit() (
    local name
    for name in "${!SLURM_@}"; do
        [[ $name == SLURM_@(CONF|CLUSTERS|JWT) ]] || unset "$name"
    done
    ORTHANT_HOME=$home sbatch "$@"
)
