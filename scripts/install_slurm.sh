#!/usr/bin/env bash
# `make test-cluster`: install Debian's Slurm and what its test cluster needs, where something is missing. Starts no
# service and edits no configuration: the cluster brings its own, in namespaces of its own.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2 util-linux procps shellcheck)

refuse() {
    printf '%s\n' "$1" "  cure: $2" >&2
    exit 2
}

is_installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

((EUID == 0)) || refuse "the Slurm test cluster makes namespaces, mounts and network bridges, so it needs root" \
    "run as root: sudo make test-cluster; all other tests need none: make test"
command -v apt-get dpkg-query >/dev/null || refuse "the Slurm test cluster is built from Debian's packages" \
    "run on Debian 12 or newer, or on Ubuntu 22.04 or newer, for instance in a container with --privileged"

missing=()
for package in "${packages[@]}"; do
    is_installed "$package" || missing+=("$package")
done
((${#missing[@]})) || exit 0

# Debian's packages ask this file whether they may start what they install (invoke-rc.d; 101: no).
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi

echo "installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    refuse "apt-get could not install ${missing[*]} (its last lines are above, all of them in $log)" \
        "mend that and run again"
fi
rm -f "$log"
