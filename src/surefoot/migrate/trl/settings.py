"""TRL's settings and ours, as a table: what `import-trl` maps by, and docs/from-trl.md shows. Read from TRL's own sources:
0.11.4 for the kind `0.11`, 0.19.1 for the older RLOO, 1.12.0 for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NO_CLIP = 1.0e9  # no gradient norm is that large


@dataclass(frozen=True)
class Row:
    """One setting of TRL's and the key of ours that means the same; `ours` is empty where nothing does.

    `default` is what TRL does where it is not given: written out where there is a key of ours, else what needs no telling.
    `values` are pairs of (theirs, ours) where the words differ. `by_hand`: shown to the user, not written.
    `computed`: one of several settings that ours comes from, by `import_trl`.
    """

    theirs: str
    ours: str = ""
    default: Any = None
    note: str = ""
    values: tuple[tuple[Any, Any], ...] = ()
    by_hand: bool = False
    computed: bool = False


@dataclass(frozen=True)
class Kind:
    """A configuration class of TRL's: its name for people, the names it is called by, its rows, and what it always does."""

    title: str
    calls: tuple[str, ...]
    word: str
    rows: tuple[Row, ...]
    always: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


PER_UPDATE = "rollout.episodes_per_update"
_NO_SAMPLING = "log-probs are over the full vocabulary at one temperature"

# What all of TRL's trainers over transformers' TrainingArguments share, and ModelConfig's LoRA.
_ADAPTER = (
    Row(
        "use_peft",
        "policy.adapter",
        computed=True,
        note="without it all weights are trained: `adapter: null`",
    ),
    Row("lora_r", "policy.adapter.rank", computed=True),
    Row("lora_alpha", "policy.adapter.alpha", computed=True),
    Row("lora_target_modules", "policy.adapter.targets", computed=True),
    Row(
        "lora_dropout", default=0.0, note="the policy runs without dropout, or the first ratio would not be 1"
    ),
)
_ARGUMENTS = (
    Row("seed", "seed", 42),
    Row("output_dir", "run.folder", note="the folder that holds run folders"),
    Row("bf16", "policy.dtype", values=((True, "bfloat16"), (False, "float32"))),
    Row("fp16", default=False, note="needs loss scaling, which is not here; policy.dtype: bfloat16 needs none"),
    Row("lr_scheduler_type", "ppo.lr_schedule", "linear",
        values=(("linear", "linear"), ("cosine", "cosine"), ("constant", "constant"), ("constant_with_warmup", "constant"))),
    Row("warmup_ratio", "ppo.lr_warmup"),
    Row("warmup_steps", "ppo.lr_warmup", computed=True,
        note="below 1 a share of the run, as here; a number of steps is left to you"),
    Row("adam_epsilon", "ppo.adam_epsilon", 1e-8),
    Row("adam_beta1", default=0.9, note="Adam's betas are 0.9 and 0.999"),
    Row("adam_beta2", default=0.999, note="Adam's betas are 0.9 and 0.999"),
    Row("weight_decay", default=0.0, note="no weight decay; the KL penalty holds the policy"),
    Row("optim", default="adamw_torch", note="Adam; another optimiser has no counterpart"),
    Row("per_device_train_batch_size", PER_UPDATE, 8, "sizes, below", computed=True),
    Row("gradient_accumulation_steps", PER_UPDATE, 1, "sizes, below", computed=True),
    Row("num_processes", PER_UPDATE, 1, "accelerate's; one process where it is not given", computed=True),
    Row("num_train_epochs", "rollout.total_episodes", by_hand=True,
        note="a budget is counted in episodes: passes × prompts × answers to each"),
    Row("dataset_name", "task.prompts", by_hand=True, note="a JSONL file of prompts"),
    Row("train_dataset", "task.prompts", by_hand=True, note="a JSONL file of prompts"),
    Row("reward_funcs", "task.reward", by_hand=True, note="the same signature, `file.py:function`"),
    *_ADAPTER,
)  # fmt: skip
# 0.12 and later: PPO, and RLOO up to 0.21.
_ON_POLICY = (
    Row("total_episodes", "rollout.total_episodes"),
    Row("max_steps", default=-1, note="the budget is rollout.total_episodes"),
    Row("num_mini_batches", "ppo.batch_size", 1, "sizes, below", computed=True),
    Row("num_ppo_epochs", "ppo.n_epochs", 4),
    Row("kl_coef", "kl.coef", 0.05, "k1 in the reward"),
    Row("cliprange", "ppo.clip_range", 0.2),
    Row("response_length", "generation.max_new_tokens", 53),
    Row("temperature", "generation.temperature", 0.7),
    Row("stop_token", default="eos",
        note="an answer ends at the model's end tokens, always; TRL writes on to response_length without this"),
    Row("stop_token_id", "generation.stop_token_ids", computed=True),
    Row("missing_eos_penalty", "shaping.missing_eos_penalty", note="subtracted from the score, in both"),
    Row("sft_model_path", "policy.model"),
    Row("model_name_or_path", note="TRL's script takes the tokenizer there; what is trained is sft_model_path"),
    Row("reward_model_path", "task.reward", by_hand=True,
        note="a classifier with one score: call it in a reward function, or learn one (reward-model.md)"),
    *_ARGUMENTS,
)  # fmt: skip
_GROUPS = (
    Row("model_name_or_path", "policy.model"),
    Row(
        "max_steps",
        "rollout.total_episodes",
        -1,
        "optimiser steps × their answers / num_iterations",
        computed=True,
    ),
    Row("generation_batch_size", PER_UPDATE, None, "sizes, below", computed=True),
    Row("steps_per_generation", PER_UPDATE, None, "sizes, below", computed=True),
    Row("num_iterations", "ppo.n_epochs", 1),
    Row("epsilon", "ppo.clip_range", 0.2),
    Row("epsilon_high", "ppo.clip_range_high"),
    Row("max_completion_length", "generation.max_new_tokens", 512, "256 in TRL's earlier versions"),
    Row("temperature", "generation.temperature", 1.0),
    Row("learning_rate", "ppo.learning_rate", 1e-6),
    Row("max_grad_norm", "ppo.max_grad_norm", 1.0),
    Row("max_prompt_length", note="TRL keeps a prompt's last tokens, task.prompt_tokens the first"),
    Row(
        "mask_truncated_completions",
        default=False,
        note="shaping.missing_eos_penalty charges for them instead",
    ),
    Row(
        "reward_weights",
        "task.reward",
        by_hand=True,
        note="a list of `{name, weight}`, one of each function (extending.md)",
    ),
    Row("top_p", default=1.0, note=_NO_SAMPLING),
    Row("top_k", default=0, note=_NO_SAMPLING),
    Row("min_p", note=_NO_SAMPLING),
    Row("repetition_penalty", default=1.0, note=_NO_SAMPLING),
    Row("sync_ref_model", default=False, note="the reference is fixed"),
    Row("shuffle_dataset", default=True, note="prompts are shuffled by the seed"),
    *_ARGUMENTS,
)

OLD = Kind(
    "PPOConfig of TRL 0.11 and earlier", ("PPOConfig",), "ppo",
    (
        Row("model_name", "policy.model", note="in TRL a name for the log: see that it is what from_pretrained loads"),
        Row("steps", "rollout.total_episodes"),
        Row("batch_size", PER_UPDATE, 128, "sizes, below", computed=True),
        Row("mini_batch_size", "ppo.batch_size", 128, "sizes, below", computed=True),
        Row("forward_batch_size", "ppo.batch_size", None, "overrides mini_batch_size", computed=True),
        Row("gradient_accumulation_steps", "ppo.batch_size", 1, "sizes, below", computed=True),
        Row("num_processes", PER_UPDATE, 1, "accelerate's; one process where it is not given", computed=True),
        Row("ppo_epochs", "ppo.n_epochs", 4),
        Row("learning_rate", "ppo.learning_rate", 1.41e-5, "Adam, constant"),
        Row("init_kl_coef", "kl.coef", 0.2),
        Row("adap_kl_ctrl", "kl.target", True, "False: neither kl.target nor kl.horizon", computed=True),
        Row("target", "kl.target", 6.0, "the same controller"),
        Row("horizon", "kl.horizon", 10_000.0),
        Row("kl_penalty", "kl.placement", "kl", "k1; the others have no counterpart", (("kl", "reward"),)),
        Row("gamma", "ppo.gamma", 1.0),
        Row("lam", "ppo.gae_lambda", 0.95),
        Row("cliprange", "ppo.clip_range", 0.2),
        Row("cliprange_value", "ppo.clip_range_vf", 0.2),
        Row("vf_coef", "ppo.vf_coef", 0.1, "of ½ (V - R)², in both"),
        Row("max_grad_norm", "ppo.max_grad_norm", note="without it TRL clips nothing: `1e9` is written"),
        Row("early_stopping", "ppo.target_kl", False, "True: target_kl × 1.5, where TRL stops", computed=True),
        Row("target_kl", "ppo.target_kl", 1.0, "nothing without early_stopping; here the k3 estimate", computed=True),
        Row("use_score_scaling", "shaping.scale", values=((True, "running_std"), (False, "none"))),
        Row("use_score_norm", default=False, note="the running mean is not subtracted; the critic learns it"),
        Row("score_clip", "shaping.clip"),
        Row("whiten_rewards", "shaping.whiten", False),
        Row("ratio_threshold", note="minibatches of high ratio are not skipped; ppo.dual_clip bounds their loss"),
        Row("seed", "seed", 0),
        Row("max_new_tokens", "generation.max_new_tokens", note="from a literal `generation_kwargs`"),
        Row("temperature", "generation.temperature", note="from there too; here log-probs are divided by it, in TRL not"),
        Row("top_k", default=0, note=_NO_SAMPLING),
        Row("top_p", default=1.0, note=_NO_SAMPLING),
        Row("reward_model", "task.reward", by_hand=True, note="in TRL a name for the log"),
        Row("query_dataset", "task.prompts", by_hand=True, note="in TRL a name for the log"),
        *_ADAPTER,
    ),
    {"ppo.adam_epsilon": 1e-8, "ppo.max_grad_norm": NO_CLIP},
)  # fmt: skip
PPO = Kind(
    "PPOConfig of TRL 0.12 and later", ("PPOConfig", "PPOv2Config"), "ppo",
    (
        Row("learning_rate", "ppo.learning_rate", 3e-6, "5e-5 in TRL 0.24"),
        Row("kl_estimator", "kl.placement", "k1", "k3 in the reward has no counterpart", (("k1", "reward"),)),
        Row("gamma", "ppo.gamma", 1.0),
        Row("lam", "ppo.gae_lambda", 0.95),
        Row("cliprange_value", "ppo.clip_range_vf", 0.2),
        Row("vf_coef", "ppo.vf_coef", 0.1, "of ½ (V - R)², in both"),
        Row("whiten_rewards", "shaping.whiten", False),
        Row("max_grad_norm", default=1.0, note="TRL's PPO loop clips nothing, whatever this is: `1e9` is written"),
        *_ON_POLICY,
    ),
    {"ppo.max_grad_norm": NO_CLIP},
    ("value_model: TRL's critic is a model of its own; here that is policy.critic.kind: separate (docs/critics.md)",),
)  # fmt: skip
GRPO = Kind(
    "GRPOConfig", ("GRPOConfig",), "grpo",
    (
        Row("num_generations", "group.size", 8),
        Row("beta", "kl.coef", 0.0, "0.04 up to TRL 0.18. In the loss: TRL's k3, here k2 with the ratio (family.md)"),
        Row("scale_rewards", "ppo.advantage", "group", "by the batch's deviation has no counterpart",
            (("group", "grpo"), (True, "grpo"), ("none", "dr_grpo"), (False, "dr_grpo"))),
        Row("loss_type", "ppo.loss_aggregation", "dapo", "bnpo in TRL 0.19; the others are other losses",
            (("dapo", "token"), ("bnpo", "token"), ("grpo", "sequence"), ("dr_grpo", "constant"))),
        Row("delta", "ppo.dual_clip", note="the same bound for δ > 1 + ε"),
        Row("entropy_coef", "ppo.ent_coef"),
        Row("use_bias_correction_kl", default=True, note="the KL in the loss carries the ratio, always"),
        Row("use_adaptive_entropy", default=False, note="the entropy's weight follows ppo.ent_schedule"),
        Row("importance_sampling_level", default="token", note="ratios are each token's"),
        Row("multi_objective_aggregation", default="sum_then_normalize", note="advantages are of the rewards' weighted sum"),
        Row("top_entropy_quantile", default=1.0, note="every written token is trained on"),
        Row("off_policy_mask_threshold", note="generation.tis_cap is the one correction"),
        *_GROUPS,
    ),
    {"ppo.advantage": "grpo", "kl.placement": "loss"},
)  # fmt: skip
_RLOO_ALWAYS = {"ppo.advantage": "rloo", "ppo.loss_aggregation": "constant", "kl.placement": "reward"}
_RLOO_RATIO = (
    "the ratio: TRL clips one for the whole answer; here each token has its own. Equal at the first step of an update",
)
RLOO = Kind(
    "RLOOConfig of TRL 0.22 and later", ("RLOOConfig",), "rloo",
    (
        Row("num_generations", "group.size", 2),
        Row("beta", "kl.coef", 0.05, "k1 in the reward, in both"),
        Row("normalize_advantages", default=False, note="RLOO's advantages keep their scale"),
        Row("reward_clip_range", "shaping.clip", computed=True, note="`[-c, c]`; another range has no counterpart"),
        *_GROUPS,
    ),
    _RLOO_ALWAYS, _RLOO_RATIO,
)  # fmt: skip
OLD_RLOO = Kind(
    "RLOOConfig of TRL 0.21 and earlier", ("RLOOConfig",), "rloo",
    (
        Row("rloo_k", "group.size", 2),
        Row("learning_rate", "ppo.learning_rate", 5e-5),
        Row("normalize_reward", default=False, note="shaping.scale divides by a running deviation, not the batch's"),
        Row("normalize_advantage", default=False, note="RLOO's advantages keep their scale"),
        Row("token_level_kl", default=False, note="the KL is summed over the answer"),
        Row("max_grad_norm", default=1.0, note="TRL's loop clips nothing, whatever this is: `1e9` is written"),
        *_ON_POLICY,
    ),
    {**_RLOO_ALWAYS, "ppo.max_grad_norm": NO_CLIP}, _RLOO_RATIO,
)  # fmt: skip
KINDS = {"PPO ≤ 0.11": OLD, "PPO": PPO, "GRPO": GRPO, "RLOO": RLOO, "RLOO ≤ 0.21": OLD_RLOO}

# Settings of accelerate, transformers and TRL that change logging, saving, speed, or nothing, and families of them, some of
# switches that are in the table (`loss_type`, `sync_ref_model`, `use_adaptive_entropy`). Others are "not known".
_NAMES = """
    accelerator_config accelerator_kwargs attn_implementation average_tokens_across_devices backward_batch_size
    batch_eval_metrics batch_size bf16_full_eval compare_steps config_file data_seed dataset_num_proc debug deepspeed
    disable_tqdm do_eval do_predict do_train ds3_gather_for_generation enable_jit_checkpoint exp_name fp16_backend
    fp16_full_eval fp16_opt_level fsdp full_determinism global_backward_batch_size global_batch_size gpu_ids greater_is_better
    group_by_length half_precision_backend ignore_data_skip include_for_metrics include_inputs_for_metrics
    include_num_input_tokens_seen include_tokens_per_second is_encoder_decoder is_peft_model jit_mode_eval label_names
    label_smoothing_factor length_column_name liger_kernel_config load_best_model_at_end local_batch_size local_mini_batch_size
    local_rank local_rollout_forward_batch_size log_on_each_node log_unique_prompts log_with lora_task_type machine_rank
    main_process_ip main_process_port metric_for_best_model micro_batch_size mini_batch_size mp_parameters multi_gpu
    num_completions_to_print num_generations_eval num_machines num_sample_generations num_total_batches optimize_cuda_cache
    optimize_device_cache overwrite_output_dir parallelism_config past_index per_device_eval_batch_size per_gpu_eval_batch_size
    per_gpu_train_batch_size prediction_loss_only project project_kwargs ray_scope remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name skip_memory_metrics task_name tf32
    torch_empty_cache_steps torchdynamo train_sampling_strategy use_cache use_cpu use_deepspeed use_ipex use_liger_kernel
    use_liger_loss use_mps_device use_transformers_paged use_vllm vllm_device vllm_enable_prefix_caching vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_max_model_len vllm_max_model_length vllm_mode vllm_model_impl
    vllm_tensor_parallel_size world_size
"""
ASIDE = frozenset(_NAMES.split())
# fmt: off
ASIDE_FAMILIES = (
    "activation_checkpointing", "dataloader_", "ddp_", "entropy_coef_", "entropy_target", "eval_", "fsdp_",
    "gradient_checkpointing", "hub_", "log_completions", "log_level", "logging_", "push_to_hub", "ref_model_", "sapo_",
    "save_", "torch_compile", "tpu_", "tracker_", "trackio_", "vespo_", "vllm_server_", "wandb_",
)
# fmt: on
