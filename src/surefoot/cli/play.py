"""Look at a trained policy: run episodes, record one, and plot what it reached."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from surefoot.api.ppo import PPO
from surefoot.build.control import build_vector
from surefoot.envs.gym import VectorStep
from surefoot.errors import InputError
from surefoot.rollout.gym import run_episodes
from surefoot.storage.files import writing
from surefoot.storage.run_folder import RunFolder
from surefoot.types import OBSERVATION, Episode

MAX_WIDTH = 480  # pixels
MAX_FRAMES = 600
ATARI_FPS = 60.0  # of the console; a step of the policy is `frameskip` of its frames
RATES = {"is_success": "success", "crashed": "crashed"}  # name in an episode's last info -> what it is called


class VideoRecorder:
    """Frames of one episode, evenly thinned to `MAX_FRAMES` and scaled down to `MAX_WIDTH`."""

    def __init__(self) -> None:
        self.frames: list[Any] = []  # Pillow images of 256 colours each
        self.fps, self.seen, self.stride = 30.0, 0, 1

    def show(self, frame: NDArray[numpy.uint8], fps: float) -> None:
        """Take a frame [H, W, 3] (or [H, W], grey)."""
        if self.seen % self.stride == 0:
            from PIL import Image

            image = Image.fromarray(numpy.ascontiguousarray(frame))
            # Small pictures are enlarged by a whole factor: players blur what they enlarge themselves.
            is_small = image.width < MAX_WIDTH // 2
            factor = max(1, 336 // image.width) if is_small else min(1.0, MAX_WIDTH / image.width)
            size = (round(image.width * factor), round(image.height * factor))
            smooth = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            image = image.convert("RGB").resize(size, smooth)
            self.frames.append(image.quantize(256, dither=Image.Dither.NONE))
        self.seen, self.fps = self.seen + 1, fps
        if len(self.frames) > MAX_FRAMES:
            self.frames, self.stride = self.frames[::2], 2 * self.stride

    def save(self, path: Path) -> None:
        """Write a GIF or, by the name's ending, an MP4, in the time the episode took."""
        fps = self.fps / self.stride
        if path.suffix == ".gif":
            # GIF counts hundredths of a second, and viewers slow down what is faster than two of them.
            every = max(20, round(100 / fps) * 10)
            self.frames[0].save(path, save_all=True, append_images=self.frames[1:], duration=every, loop=0)
            return
        import imageio_ffmpeg

        width, height = (side - side % 2 for side in self.frames[0].size)  # the codec wants even sides
        options = {"fps": fps, "macro_block_size": 2, "ffmpeg_log_level": "error"}
        writer = imageio_ffmpeg.write_frames(str(path), (width, height), **options)
        writer.send(None)
        for frame in self.frames:
            writer.send(frame.convert("RGB").crop((0, 0, width, height)).tobytes())
        writer.close()


def play_run(source: str | Path, episodes: int = 10, output: Any = None, kind: str = "gif") -> list[Episode]:
    """Play a run's best policy on evaluation episodes with greedy actions; print and draw the outcome.

    Writes `episode.gif` (or .mp4, by `kind`) of the first episode and `returns.png` into `output` (default:
    `play/` in the run). Raises InputError for a run that has no environment, or where a library is missing.
    """
    run = RunFolder.open(source)
    config = run.config()
    if config.env is None:
        raise InputError(f'{source} trained a language model: surefoot generate {source} "your text"')
    if config.env.id is None:
        how = "there: evaluate_policy(PPO.open(run, env), env)"
        raise InputError(f"{source} has an environment made in Python; {how}")
    if episodes < 1:
        raise InputError(f"--episodes: expected a whole number above 0, got {episodes}")
    if not all(importlib.util.find_spec(module) for module in ("PIL", "matplotlib")):
        raise InputError("play needs Pillow and matplotlib: pip install 'surefoot[play]'")
    if kind == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise InputError("--format mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg")
    folder = Path(output) if output is not None else run.path / "play"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    model, video = PPO.open(source), VideoRecorder()
    model.env.close()
    played = _play(model, episodes, video)
    returns, steps = numpy.array([e.total for e in played]), numpy.array([e.steps for e in played])
    print(f"{config.env.id}: {len(played)} episodes with greedy actions")
    print(f"return  {returns.mean():.2f} ± {returns.std():.2f}  ({returns.min():.2f} to {returns.max():.2f})")
    print(f"length  {steps.mean():.1f} ± {steps.std():.1f} steps")
    for key, called in RATES.items():
        if told := [episode.info[key] for episode in played if key in episode.info]:
            print(f"{called:7} {100 * sum(told) / len(told):.0f} % of episodes")
    if video.frames:
        video.save(folder / f"episode.{kind}")
        print(folder / f"episode.{kind}")
    draw(folder / "returns.png", config.env.id, run.read("metrics.jsonl"), returns)
    print(folder / "returns.png")
    return played


def _play(model: PPO, episodes: int, video: VideoRecorder) -> list[Episode]:
    """The episodes; the first is recorded."""
    assert model.config.env is not None
    fps = ATARI_FPS / float(model.config.env.kwargs.get("frameskip", 4))
    is_over = False

    def on_step(step: VectorStep) -> None:
        nonlocal is_over
        if not is_over:
            video.show(step.observations[OBSERVATION][0][-1], fps)
            is_over = bool(step.ended[0])

    with contextlib.closing(build_vector(model.config, for_evaluation=True)) as vector:
        # A vectorized Atari game cannot be rendered, but the policy sees pictures: the newest of the stack.
        space = vector.observation_spaces.get(OBSERVATION)
        is_native = model.config.env.vectorization == "native"
        sees_pictures = is_native and space is not None and len(space.shape) == 3
        played = run_episodes(model.policy, vector, episodes, on_step=on_step if sees_pictures else None)
    if sees_pictures:
        return played
    # The first episode once more, in an environment that is rendered.
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("SDL_VIDEODRIVER", "offscreen")  # else pygame complains of the missing screen
    try:
        with contextlib.closing(build_vector(model.config, for_evaluation=True, show=video.show)) as vector:
            run_episodes(model.policy, vector, 1)
    except InputError as error:
        video.frames = []
        print(f"no video: {error}")
    return played


def draw(path: Path, name: str, rows: list[dict[str, Any]], returns: NDArray[Any]) -> None:
    """Write a PNG: the learning curve from metrics.jsonl, beside a histogram of the played returns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    curve, histogram = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(name, fontsize=15)
    steps = {0: 0.0} | {row["update"]: row["timesteps"] for row in rows if "timesteps" in row}
    train = [(row["timesteps"], row["rollout/ep_rew_mean"]) for row in rows if "rollout/ep_rew_mean" in row]
    evaluated = [row for row in rows if "eval/reward" in row]
    tests = [(steps[row["update"]], row["eval/reward"], row["eval/reward_std"]) for row in evaluated]
    if train:
        label = "training, mean of the last 100 episodes"
        curve.plot(*zip(*train, strict=True), color="tab:blue", label=label)
    if tests:
        x, mean, std = zip(*tests, strict=True)
        style = "o-" if len(x) > 2 else "o"  # a line from start to end would show what nobody measured
        label = "evaluation, mean ± std"
        curve.errorbar(x, mean, yerr=std, fmt=style, color="tab:orange", capsize=3, label=label)
    if train or tests:
        curve.legend(frameon=False)
    curve.set(title="learning curve", xlabel="timesteps", ylabel="return of an episode")
    curve.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", " "))
    curve.grid(alpha=0.3)
    around = max(1.0, 0.05 * abs(returns.mean()), float(numpy.ptp(returns)) / 2)  # all may be alike
    middle = (returns.min() + returns.max()) / 2
    span, bins = (middle - around, middle + around), min(20, max(5, len(returns) // 2))
    histogram.hist(returns, bins=bins, range=span, color="tab:blue", edgecolor="white")
    histogram.axvline(returns.mean(), color="black", linestyle="--")
    title = f"{len(returns)} episodes played: {returns.mean():.1f} ± {returns.std():.1f}"
    histogram.set(title=title, xlabel="return of an episode", ylabel="episodes")
    histogram.yaxis.get_major_locator().set_params(integer=True)
    for axes in (curve, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
