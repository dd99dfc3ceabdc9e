"""What settings are called elsewhere: Megatron-LM, torchtitan, DeepSpeed, Hugging Face's Trainer and configurations.

Read after a refusal only, to say what was probably meant. No name is taken for ours: some of them count other things.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

ELSEWHERE = {
    # Sections
    "training": "train trainer training_args training_arguments job experiment",
    "optimizer": "optim",
    "schedule": "lr_scheduler scheduler",
    "parallel": "parallelism parallelisms mesh distributed",
    "evaluation": "validation eval validate",
    "logging": "metrics",
    "profile": "profiling profiler",
    "model": "architecture network",
    "data": "dataset datasets dataloader corpus",
    # How long and how much
    "training.train_steps": """
        steps train_iters max_steps max_iters num_steps num_train_steps total_steps iterations train_samples
        num_train_epochs num_epochs max_epochs""",
    "training.global_batch_size": """
        batch_size train_batch_size total_batch_size effective_batch_size gradient_accumulation_steps grad_accum_steps
        accumulate_grad_batches gradient_accumulation""",
    "training.micro_batch_size": """
        batch_size micro_batch mbs per_device_train_batch_size per_gpu_train_batch_size local_batch_size
        train_micro_batch_size_per_gpu device_batch_size microbatch_size pipeline_parallel_microbatch_size""",
    "training.seq_length": """
        seq_len sequence_length sequence_len max_seq_length max_seq_len max_sequence_length block_size context_length
        model_max_length max_length cutoff_len""",
    "training.precision": """
        mixed_precision mixed_precision_param dtype torch_dtype params_dtype bf16 fp16 half amp fp8_format
        enable_fp8 float8 float16 bfloat16""",
    "training.recompute_granularity": """
        recompute recompute_method recompute_activations gradient_checkpointing activation_checkpointing
        activation_checkpoint activation_checkpoint_mode selective_ac_option checkpoint_activations
        enable_activation_checkpointing""",
    "training.seed": "random_seed data_seed",
    # The optimizer and its schedule
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr",
    "optimizer.weight_decay": "wd decay",
    "optimizer.adam_beta1": "beta1 beta_1 betas",
    "optimizer.adam_beta2": "beta2 beta_2 betas",
    "optimizer.adam_eps": "eps epsilon adam_epsilon",
    "optimizer.clip_grad": """
        max_norm max_grad_norm grad_clip gradient_clip gradient_clipping gradient_clip_val clip_grad_norm
        grad_norm_clip""",
    "schedule.kind": "lr_scheduler_type lr_decay_style lr_schedule scheduler_type decay_type scheduler_name",
    "schedule.warmup_steps": """
        warmup lr_warmup_iters lr_warmup_steps lr_warmup_samples num_warmup_steps warmup_iters warmup_ratio
        lr_warmup_fraction""",
    "schedule.decay_steps": "lr_decay_iters lr_decay_steps lr_decay_samples decay_iters",
    "schedule.wsd_decay_steps": "lr_wsd_decay_iters lr_wsd_decay_samples decay_ratio num_decay_steps",
    "schedule.min_lr": "min_lr_factor min_lr_ratio min_lr_rate end_lr final_lr lr_min",
    # The grid
    "parallel.tensor_model_parallel_size": "tp tp_size tp_degree tensor_parallel_size tensor_parallel_degree",
    "parallel.pipeline_model_parallel_size": "pp pp_size pp_degree pipeline_parallel_size pipeline_parallel_degree",
    "parallel.virtual_pipeline_model_parallel_size": """
        vpp vpp_size num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        pipeline_parallel_layers_per_stage""",
    "parallel.context_parallel_size": "cp cp_size cp_degree context_parallel_degree ulysses_degree",
    "parallel.expert_model_parallel_size": "ep ep_size ep_degree expert_parallel_size expert_parallel_degree",
    "parallel.data_parallel_size": """
        dp dp_size dp_degree data_parallel_degree data_parallel_shard_degree data_parallel_replicate_degree""",
    "parallel.sequence_parallel": "sp enable_sequence_parallel",
    "parallel.zero_stage": """
        zero zero_optimization fsdp deepspeed use_distributed_optimizer data_parallel_sharding_strategy
        fsdp_sharding_strategy sharding_strategy zero_level""",
    "parallel.zero_implementation": "use_megatron_fsdp use_torch_fsdp2 fsdp_version use_fsdp2",
    "parallel.grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32 mixed_precision_reduce",
    "parallel.bucket_size": "ddp_bucket_size bucket_cap_mb ddp_bucket_cap_mb reduce_bucket_size",
    "parallel.cuda_graphs": "enable_cuda_graph cuda_graph cuda_graph_impl external_cuda_graph",
    "parallel.pipeline_layers": """
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers pipeline_model_parallel_layout
        pipeline_parallel_split_points""",
    # The architecture
    "model.preset": "flavor model_name model_size",
    "model.kernels": "transformer_impl attention_backend attn_implementation use_flash_attn flash_attention attn_type",
    "model.num_layers": "num_hidden_layers n_layers n_layer num_decoder_layers depth",
    "model.hidden_size": "dim n_embd d_model hidden_dim embed_dim embedding_size",
    "model.ffn_hidden_size": "intermediate_size ffn_dim d_ff n_inner mlp_dim feedforward_size",
    "model.num_attention_heads": "n_heads n_head num_heads",
    "model.num_query_groups": "num_key_value_heads n_kv_heads num_kv_heads",
    "model.kv_channels": "head_dim head_size d_head",
    "model.vocab_size": "padded_vocab_size n_vocab vocabulary_size",
    "model.max_position_embeddings": "max_positions n_positions n_ctx max_sequence",
    "model.rotary_base": "rope_theta rotary_theta theta rope_base",
    "model.layernorm_epsilon": "rms_norm_eps norm_epsilon norm_eps layer_norm_eps layer_norm_epsilon",
    "model.qk_layernorm": "qk_norm use_qk_norm",
    "model.add_qkv_bias": "attention_bias qkv_bias use_bias",
    "model.share_embeddings_and_output_weights": """
        tie_word_embeddings tie_embeddings weight_tying untie_embeddings_and_output_weights""",
    "model.window_size": "sliding_window sliding_window_size attention_window",
    "model.num_experts": "num_local_experts n_routed_experts n_experts num_moe_experts",
    "model.moe_router_topk": "num_experts_per_tok num_experts_per_token top_k topk experts_per_token",
    "model.moe_ffn_hidden_size": "moe_intermediate_size expert_hidden_size",
    "model.moe_aux_loss_coeff": "router_aux_loss_coef router_aux_loss_coeff aux_loss_alpha",
    "model.moe_z_loss_coeff": "router_z_loss_coef router_z_loss_coeff",
    "model.init_method_std": "initializer_range init_std initialization_std",
    "model.hidden_dropout": "dropout resid_pdrop residual_dropout",
    "model.attention_dropout": "dropout attn_pdrop attn_dropout",
    # Checkpoints, evaluation, what is written
    "run.folder": "output_dir out_dir output_folder dump_folder default_root_dir save_dir checkpoint_dir work_dir",
    "init.checkpoint": """
        model_name_or_path pretrained_model_name_or_path pretrained_checkpoint initial_load_path init_from load_from
        resume_from""",
    "checkpoint.interval": """
        save_interval save_steps save_every save_freq checkpoint_interval checkpoint_every ckpt_interval
        checkpointing_steps every_n_train_steps save_iters""",
    "checkpoint.keep_last": "keep_latest_k save_total_limit save_top_k max_checkpoints keep_n_checkpoints",
    "checkpoint.keep_every": "save_retain_interval non_persistent_save_interval",
    "checkpoint.asynchronous": "async async_save async_mode async_checkpoint enable_async_checkpoint background",
    "checkpoint.resume": "resume_from_checkpoint auto_resume load_checkpoint no_resume",
    "evaluation.interval": "eval_interval eval_steps eval_every validation_freq val_check_interval eval_freq",
    "evaluation.batches": "eval_iters eval_batches validation_steps limit_val_batches max_eval_batches",
    "guards.on_nan": """
        check_for_nan_in_loss_and_grad check_for_nan_in_loss rerun_mode detect_anomaly skip_nan nan_check""",
    "guards.on_spike": "check_for_spiky_loss check_for_large_grads",
    "logging.log_interval": "logging_steps log_freq log_every log_every_n_steps print_freq",
    "logging.tensorboard": "enable_tensorboard tensorboard_dir use_tensorboard report_to",
    "logging.wandb": "enable_wandb use_wandb report_to",
    "logging.wandb_project": "project project_name wandb_name",
    "watchdog.timeout_seconds": "distributed_timeout_minutes ddp_timeout init_timeout_seconds train_timeout_seconds",
    "profile.steps": "enable_profiling profile_step_start profile_step_end profile_freq",
    # Data
    "data.sources": """
        data_path data_paths train_data_path train_path train_file train_files dataset datasets dataset_path
        dataset_name corpus files paths""",
    "data.validation_sources": "valid_data_path validation_file validation_path eval_path eval_dataset",
    "data.validation_fraction": "split splits validation_split validation_split_percentage val_split test_size",
    "data.text_key": "text_column text_field dataset_text_field json_keys content_key",
    "data.tokenizer.path": "tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path hf_assets_path",
    "data.tokenizer.kind": "tokenizer_type",
    "data.document_mask": "reset_attention_mask document_attention_mask intra_doc_masking",
    # Post-training
    "ppo.max_new_tokens": "max_completion_length response_length max_response_length",
    "ppo.answers_per_prompt": "num_generations num_samples_per_prompt n_samples_per_prompt rollout_n",
    "ppo.divide_by_deviation": "scale_rewards norm_adv_by_std_in_grpo",
    "ppo.algorithm": "adv_estimator advantage_estimator",
    "ppo.clip_range_high": "clip_ratio_high epsilon_high clip_epsilon_high eps_clip_high",
    "ppo.loss_over": "loss_type loss_agg_mode",
    "ppo.epochs": "ppo_epochs num_ppo_epochs update_epochs",
    "ppo.mini_batches": "num_mini_batches ppo_mini_batch_size",
    "ppo.gae_lambda": "lam gae_lam",
    "ppo.clip_range": "cliprange clip_ratio clip_ratio_low clip_epsilon eps_clip",
    "ppo.value_clip_range": "cliprange_value value_clip vf_clip",
    "ppo.kl_coefficient": "kl_coef init_kl_coef kl_penalty kl_loss_coef",
    "ppo.entropy_coefficient": "entropy_coeff entropy_coef ent_coef",
    "dpo.beta": "dpo_beta",
}
"""Our settings, and words that others have for them."""

DIFFERS = {
    "gradient_accumulation_steps": "micro_batch_size x replicas x accumulated steps",
    "grad_accum_steps": "micro_batch_size x replicas x accumulated steps",
    "accumulate_grad_batches": "micro_batch_size x replicas x accumulated steps",
    "gradient_accumulation": "micro_batch_size x replicas x accumulated steps",
    "train_samples": "in steps, not in samples",
    "num_train_epochs": "in steps, not in epochs",
    "num_epochs": "in steps, not in epochs",
    "max_epochs": "in steps, not in epochs",
    "warmup_ratio": "in steps, not as a share",
    "lr_warmup_fraction": "in steps, not as a share",
    "lr_warmup_samples": "in steps, not in samples",
    "lr_decay_samples": "in steps, not in samples",
    "lr_wsd_decay_samples": "in steps, not in samples",
    "decay_ratio": "in steps, not as a share",
    "min_lr_factor": "a learning rate, not a share",
    "min_lr_ratio": "a learning rate, not a share",
    "min_lr_rate": "a learning rate, not a share",
    "num_layers_per_virtual_pipeline_stage": "chunks of a stage, not layers of a chunk",
    "pipeline_parallel_layers_per_stage": "chunks of a stage, not layers of a chunk",
    "decoder_first_pipeline_num_layers": "layers of every stage",
    "decoder_last_pipeline_num_layers": "layers of every stage",
    "bucket_cap_mb": "in parameters, not in MB",
    "ddp_bucket_cap_mb": "in parameters, not in MB",
    "untie_embeddings_and_output_weights": "the other way round",
    "use_bias": "of queries, keys and values alone",
    "no_resume": "the other way round",
    "distributed_timeout_minutes": "in seconds, not in minutes",
    "validation_split_percentage": "a share, not in percent",
    "split": "the share held out",
    "splits": "the share held out",
    "ppo_mini_batch_size": "how many, not how large",
    "bf16": "fp32, bf16 or fp8",
    "fp16": "fp32, bf16 or fp8",
}
"""Words behind which others count something else, or the same in other units: what ours is."""


def meant(word: str, settings: Collection[str]) -> tuple[Sequence[str], str]:
    """Those of `settings` that `word`, however it is spelled, stands for elsewhere; and what ours counts instead.

    The latter is "" where ours counts the same.
    """
    plain = _plain(word)
    found = [ours for ours, words in ELSEWHERE.items() if ours in settings and plain in map(_plain, words.split())]
    return found, next((note for other, note in DIFFERS.items() if _plain(other) == plain), "")


def _plain(word: str) -> str:
    return word.strip("-").replace("_", "").replace("-", "").lower()
