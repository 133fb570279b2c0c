"""Other names of settings, in older files and in other libraries, and the keys that they have here."""

MOVED = {
    "kl_coef": "kl.coef",
    "kl_in": "kl.placement",
    "kl_target": "kl.target",
    "kl_horizon": "kl.horizon",
    "samples_per_prompt": "group.size",
    "skip_equal_groups": "group.skip_zero_variance",
    "missing_eos_penalty": "shaping.missing_eos_penalty",
    "reward_scale": "shaping.scale",
    "reward_clip": "shaping.clip",
    "whiten_rewards": "shaping.whiten",
    "gae_lambda_critic": "policy.critic.gae_lambda",
    "critic_warmup_updates": "policy.critic.warmup_updates",
    "sampler_ratio_cap": "generation.tis_cap",
    "newest": "env.self_play.latest",
    "add_every": "env.self_play.snapshot_every",
    "blunders": "env.self_play.random_move_prob",
}
