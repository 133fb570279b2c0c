"""One library on one case of `peer_sb3.py`: trains and prints steps per second and peak memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

CARTPOLE_ZOO = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "learning_rate": 1e-3,
}
ATARI = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "learning_rate": 2.5e-4,
    "clip_range": 0.1,
    "ent_coef": 0.01,
}
CASES = {  # name -> policy, environment, n_envs, PPO's keywords, timesteps to warm up and to measure
    "cartpole": ("MlpPolicy", "CartPole-v1", 8, CARTPOLE_ZOO, 2_560, 25_600),
    "cartpole-defaults": ("MlpPolicy", "CartPole-v1", 8, {}, 1, 16_384),
    "pong": ("CnnPolicy", "Pong", 8, ATARI, 1_024, 4_096),
}


def main() -> None:
    library, case = sys.argv[1], sys.argv[2]
    policy, env, copies, settings, warm_up, steps = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        if library == "sb3":
            model = sb3(policy, env, copies, settings)
        else:
            model = surefoot(policy, env, settings | {"n_envs": copies, "run_folder": folder}, sys.argv[3:])
        model.learn(total_timesteps=warm_up)
        started = time.perf_counter()
        model.learn(total_timesteps=steps)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"steps_per_s": steps / seconds, "peak_mib": peak}))


def sb3(policy, env, copies, settings):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    if env == "Pong":
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        made = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=copies, seed=0), n_stack=4)
    else:
        made = make_vec_env(env, n_envs=copies, seed=0)
    return PPO(policy, made, verbose=0, device="cpu", seed=0, **settings)


def surefoot(policy, env, settings, options):
    from surefoot import PPO

    more = {"vectorization": "native"} if env == "Pong" or "native" in options else {}
    more |= {"dtype": "float32"} if "float32" in options else {}
    if env == "Pong":
        more["env_kwargs"] = {"episodic_life": True, "reward_clipping": True}
    name = "ale_py:ALE/Pong-v5" if env == "Pong" else env
    return PPO(policy, name, verbose=0, seed=0, evaluate_episodes=0, **settings, **more)


if __name__ == "__main__":
    main()
