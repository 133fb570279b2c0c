"""TRL's settings and ours (docs/from-trl.md): TRL 0.11.4 in `OLD`, 0.19.1 in `OLD_RLOO`, 1.12.0 elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A configuration class of TRL's. Every default is what TRL does where a setting is not given."""

    title: str
    word: str  # in a command or a file's name
    maps: Mapping[str, tuple[str, Any]]  # theirs -> ours, default
    computed: Mapping[str, Any]  # theirs -> default; `translate` makes ours of several
    without: Mapping[str, Any]  # theirs -> default; nothing here means the same
    always: Mapping[str, Any] = field(default_factory=dict)  # ours, whatever is given
    notes: tuple[str, ...] = ()


NO_CLIP = 1.0e9  # no gradient norm is that large
EPISODES, PER_UPDATE, STEP = "rollout.total_episodes", "rollout.episodes_per_update", "ppo.batch_size"
PROMPTS, REWARD, TOKENS = "task.prompts", "task.reward", "generation.max_new_tokens"
# fmt: off
_LORA = {"use_peft": None, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": None}
_WITHOUT = {"lora_dropout": 0.0, "use_rslora": False, "fp16": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
            "weight_decay": 0.0, "optim": "adamw_torch"}
_ARGUMENTS = {"seed": ("seed", 42), "output_dir": ("run.folder", None), "bf16": ("policy.dtype", True),
              "lr_scheduler_type": ("ppo.lr_schedule", "linear"), "warmup_ratio": ("ppo.lr_warmup", None)}
_EPSILON = {"adam_epsilon": ("ppo.adam_epsilon", 1e-8)}
_SIZES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_processes": 1,
          "warmup_steps": 0} | _LORA
# 0.12 and later: PPO, and RLOO up to 0.21, whose loops clip no gradient, whatever max_grad_norm is.
_ON_POLICY = {"total_episodes": (EPISODES, None), "num_ppo_epochs": ("ppo.n_epochs", 4),
              "kl_coef": ("kl.coef", 0.05), "cliprange": ("ppo.clip_range", 0.2),
              "response_length": (TOKENS, 53), "sft_model_path": ("policy.model", None),
              "temperature": ("generation.temperature", 0.7),
              "missing_eos_penalty": ("shaping.missing_eos_penalty", None)} | _ARGUMENTS
_ON_POLICY_WITHOUT = {"max_steps": -1, "stop_token": "eos", "stop_token_id": None, "model_name_or_path": None,
                      "max_grad_norm": 1.0} | _WITHOUT
_GROUPS = {"model_name_or_path": ("policy.model", None), "num_iterations": ("ppo.n_epochs", 1),
           "epsilon": ("ppo.clip_range", 0.2), "max_completion_length": (TOKENS, 512),
           "temperature": ("generation.temperature", 1.0), "learning_rate": ("ppo.learning_rate", 1e-6),
           "mask_truncated_completions": ("ppo.mask_truncated", False)} | _ARGUMENTS
_GROUP_SIZES = {"max_steps": -1, "generation_batch_size": None, "steps_per_generation": None} | _SIZES
_GROUPS_WITHOUT = {"max_prompt_length": None, "top_p": 1.0, "top_k": 0, "min_p": None,
                   "repetition_penalty": 1.0, "sync_ref_model": False, "shuffle_dataset": True} | _WITHOUT
_CRITIC = {"gamma": ("ppo.gamma", 1.0), "lam": ("ppo.gae_lambda", 0.95),
           "cliprange_value": ("ppo.clip_range_vf", 0.2), "vf_coef": ("ppo.vf_coef", 0.1),
           "whiten_rewards": ("shaping.whiten", False)}
OLD = Kind("PPOConfig of TRL 0.11 and earlier", "ppo",
    {"model_name": ("policy.model", None), "steps": (EPISODES, None), "ppo_epochs": ("ppo.n_epochs", 4),
     "seed": ("seed", 0), "learning_rate": ("ppo.learning_rate", 1.41e-5), "init_kl_coef": ("kl.coef", 0.2),
     "target": ("kl.target", 6.0), "horizon": ("kl.horizon", 10_000.0), "kl_penalty": ("kl.placement", "kl"),
     "cliprange": ("ppo.clip_range", 0.2), "max_grad_norm": ("ppo.max_grad_norm", NO_CLIP),
     "score_clip": ("shaping.clip", None), "use_score_scaling": ("shaping.scale", None)} | _CRITIC,
    {"batch_size": 128, "mini_batch_size": 128, "forward_batch_size": None, "gradient_accumulation_steps": 1,
     "num_processes": 1, "adap_kl_ctrl": True, "early_stopping": False, "target_kl": 1.0} | _LORA,
    {"use_score_norm": False, "ratio_threshold": 10.0, "lora_dropout": 0.0, "use_rslora": False},
    {"ppo.adam_epsilon": 1e-8, "policy.dtype": "float32"},
    ("generation_kwargs: here log-probs are divided by generation.temperature too; top_k, top_p: none",))
PPO = Kind("PPOConfig of TRL 0.12 and later", "ppo",
    {"learning_rate": ("ppo.learning_rate", 3e-6),
     "kl_estimator": ("kl.placement", "k1")} | _CRITIC | _ON_POLICY | _EPSILON,
    {"num_mini_batches": 1} | _SIZES, _ON_POLICY_WITHOUT, {"ppo.max_grad_norm": NO_CLIP},
    ("value_model: TRL's critic is a separate model: policy.critic.kind: separate (docs/critics.md)",))
GRPO = Kind("GRPOConfig", "grpo",
    {"num_generations": ("group.size", 8), "beta": ("kl.coef", 0.0),
     "scale_rewards": ("ppo.advantage", "group"), "loss_type": ("ppo.loss_aggregation", "dapo"),
     "importance_sampling_level": ("ppo.importance_sampling_level", "token"),
     "max_grad_norm": ("ppo.max_grad_norm", 1.0)} | _GROUPS | _EPSILON,
    {"epsilon_high": None, "delta": None, "entropy_coef": 0.0} | _GROUP_SIZES,
    {"use_bias_correction_kl": True, "use_adaptive_entropy": False,
     "multi_objective_aggregation": "sum_then_normalize", "top_entropy_quantile": 1.0,
     "off_policy_mask_threshold": None} | _GROUPS_WITHOUT,
    {"kl.placement": "loss"})
_RLOO = {"ppo.advantage": "rloo", "ppo.loss_aggregation": "constant", "kl.placement": "reward"}
_RATIO = ("the ratio: TRL clips the completion's, here each token's; both are 1 at an update's first step",)
RLOO = Kind("RLOOConfig of TRL 0.22 and later", "rloo",
    {"num_generations": ("group.size", 2), "beta": ("kl.coef", 0.05),
     "epsilon_high": ("ppo.clip_range_high", None)} | _GROUPS,
    {"reward_clip_range": None, "max_grad_norm": 1.0, "adam_epsilon": 1e-8} | _GROUP_SIZES,
    {"normalize_advantages": False} | _GROUPS_WITHOUT, _RLOO, _RATIO)
OLD_RLOO = Kind("RLOOConfig of TRL 0.21 and earlier", "rloo",
    {"rloo_k": ("group.size", 2), "learning_rate": ("ppo.learning_rate", 5e-5)}
    | _ON_POLICY | {"bf16": ("policy.dtype", False)},
    {"num_mini_batches": 1, "adam_epsilon": 1e-8} | _SIZES,
    {"normalize_reward": False, "normalize_advantage": False, "token_level_kl": False} | _ON_POLICY_WITHOUT,
    _RLOO | {"ppo.max_grad_norm": NO_CLIP}, _RATIO)
KINDS = (OLD, PPO, GRPO, RLOO, OLD_RLOO)

# Where the words differ; the first of ours stands for a value that has no counterpart.
VALUES: dict[str, dict[Any, str]] = {
    "bf16": {True: "bfloat16", False: "float32"}, "use_score_scaling": {True: "running_std", False: "none"},
    "kl_penalty": {"kl": "reward"}, "kl_estimator": {"k1": "reward"},
    "lr_scheduler_type": {"linear": "linear", "cosine": "cosine", "constant": "constant",
                          "constant_with_warmup": "constant"},
    "scale_rewards": {"group": "grpo", True: "grpo", "none": "dr_grpo", False: "dr_grpo"},
    "loss_type": {"dapo": "token", "bnpo": "token", "grpo": "sequence", "dr_grpo": "constant",
                  "cispo": "token"},
    "importance_sampling_level": {"token": "token", "sequence": "sequence"},
}
# Setting and default -> what other versions of TRL have in its place.
ELSEWHERE: dict[tuple[str, Any], str] = {
    ("beta", 0.0): "0.04 up to TRL 0.18", ("loss_type", "dapo"): "bnpo in TRL 0.19",
    ("bf16", True): "false in earlier TRL", ("max_completion_length", 512): "256 in earlier TRL",
    ("learning_rate", 3e-6): "5e-5 in TRL 0.24",
}
BY_HAND = {"num_train_epochs": EPISODES, "dataset_name": PROMPTS, "query_dataset": PROMPTS} | dict.fromkeys(
    ("reward_funcs", "reward_weights", "reward_model", "reward_model_path"), REWARD)
# Settings that change logging, saving, speed or nothing; with `*` families of them.
ASIDE = """
    accelerator_* activation_checkpointing* attn_implementation average_tokens_across_devices
    backward_batch_size batch_eval_metrics batch_size bf16_full_eval compare_steps config_file data_seed
    dataloader_* dataset_num_proc ddp_* debug deepspeed disable_tqdm do_* ds3_* enable_jit_checkpoint
    entropy_coef_* entropy_target* eval_* exp_name fp16_* fsdp* full_determinism global_* gpu_ids
    gradient_checkpointing* greater_is_better group_by_length half_precision_backend hub_* ignore_data_skip
    include_* is_* jit_mode_eval label_* length_column_name liger_* load_best_model_at_end local_* log_*
    logging_* lora_task_type machine_rank main_process_* metric_for_best_model micro_batch_size
    mini_batch_size mp_parameters multi_gpu num_completions_to_print num_generations_eval num_machines
    num_sample_generations num_total_batches optimize_* overwrite_output_dir parallelism_config past_index
    per_device_eval_batch_size per_gpu_* prediction_loss_only project* push_to_hub* ray_scope ref_model_*
    remove_unused_columns report_to restore_* resume_* run_name sapo_* save_* skip_memory_metrics task_name
    tf32 torch_compile* torch_empty_cache_steps torchdynamo total_ppo_epochs tpu_* tracker_* trackio_*
    train_sampling_strategy use_cache use_cpu use_deepspeed use_ipex use_liger_* use_mps_device
    use_transformers_paged use_vllm vespo_* vllm_device vllm_enable_* vllm_gpu_* vllm_group_port vllm_max_*
    vllm_mode* vllm_server_* vllm_tensor_* wandb_* world_size
"""
