"""`surefoot play`: the video, the plot and the numbers of a trained policy, and what it says where there is none."""

import importlib.util
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

from surefoot import PPO
from surefoot.cli.play import MAX_FRAMES, MAX_WIDTH, VideoRecorder, play_run
from tests.inputs import refusal, run_cli

SEES_NOTHING = "import gymnasium\ndef make(render_mode=None):\n    return gymnasium.make('CartPole-v1')\n"


def trained(folder: Path, env: object = "CartPole-v1") -> Path:
    """The folder of a run of two updates."""
    run = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, run_folder=str(folder), verbose=0).learn(64).run_folder
    assert run is not None
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"))


def test_a_run_is_played_filmed_and_plotted(run):
    outcome = run_cli("play", run, "--episodes", 3)
    for episodes in (0, -3):
        refusal(lambda n=episodes: play_run(run, episodes=n), "--episodes")
    assert outcome.code == 0 and all(said in outcome.out for said in ("CartPole-v1: 3 episodes", "return", "±"))
    with Image.open(run / "play" / "episode.gif") as video, Image.open(run / "play" / "returns.png") as plot:
        assert video.n_frames > 1 and video.width <= MAX_WIDTH and plot.width > 1000


def test_the_film_is_of_the_first_episode_that_was_played(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(VideoRecorder, "show", lambda self, frame, fps: seen.append((frame.shape, fps)))
    first = play_run(run, episodes=1, output=tmp_path)[0]
    assert seen == [((400, 600, 3), 50.0)] * (first.steps + 1)  # what was reset to, and every step's outcome


def test_long_films_are_thinned_evenly_and_keep_their_time(tmp_path):
    video = VideoRecorder()
    for value in range(MAX_FRAMES + 100):
        video.show(np.full((4, 960, 3), value % 256, dtype=np.uint8), fps=50.0)
    assert len(video.frames) == (MAX_FRAMES + 100) // 2 and video.frames[0].size == (480, 2)
    video.save(tmp_path / "video.gif")
    lasts = 0
    with Image.open(tmp_path / "video.gif") as gif:
        for frame in range(gif.n_frames):
            gif.seek(frame)
            lasts += gif.info["duration"]
    assert lasts == 1000 * (MAX_FRAMES + 100) / 50.0


def test_without_pictures_the_plot_is_drawn_all_the_same(tmp_path, capsys):
    (tmp_path / "env.py").write_text(SEES_NOTHING)
    run = trained(tmp_path / "runs", f"{tmp_path / 'env.py'}:make")
    play_run(run, episodes=1)
    assert "no video: env make cannot be made: ValueError: it has no render_mode rgb_array" in capsys.readouterr().out
    assert [path.name for path in (run / "play").iterdir()] == ["returns.png"]


@pytest.mark.parametrize(
    ("library", "kind", "how"), [("matplotlib", "gif", "surefoot[play]"), ("imageio_ffmpeg", "mp4", "imageio-ffmpeg")]
)
def test_a_missing_library_is_named_with_how_to_get_it(run, monkeypatch, library, kind, how):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    run_cli("play", run, "--format", kind).refused("pip install", how)


def test_a_language_models_run_and_an_environment_made_in_python_are_sent_elsewhere(tmp_path):
    (tmp_path / "config.yaml").write_text("task: {prompts: p.jsonl, reward: r.py:reward}\n")
    run_cli("play", tmp_path).refused(f"surefoot generate {tmp_path}")
    env = gymnasium.make("CartPole-v1")
    run = trained(tmp_path / "runs", env)
    refusal(lambda: play_run(run), "made in Python", "PPO.open")
    assert PPO.open(run, env).predict(env.reset(seed=0)[0], deterministic=True)[0] in (0, 1)
