"""Networks and action heads for control against torch.distributions, one step at a time, and numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from surefoot.config import NetworkConfig
from surefoot.policies.control.actions import action_head
from surefoot.policies.control.networks import Extractor
from surefoot.policies.control.policy import ControlPolicy
from surefoot.types import Batch
from tests.golden import refused

FEATURES = 6
VECTOR = spaces.Box(-numpy.inf, numpy.inf, (3,))
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(5), {}),
    "multi-discrete": (spaces.MultiDiscrete([2, 4, 3]), {}),
    "multi-binary": (spaces.MultiBinary(4), {}),
    "gaussian": (spaces.Box(-1, 1, (3,)), {"log_std": -0.7}),
    "gsde": (spaces.Box(-1, 1, (3,)), {"log_std": -0.7, "use_sde": True}),
}
MASKED = {"discrete": 5, "multi-discrete": 9}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(kind: str) -> Any:
    space, settings = HEADS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = action_head(space, FEATURES, **settings)
        for parameter in head.parameters():
            nn.init.normal_(parameter, -0.3 if parameter is getattr(head, "log_std", None) else 0.0, 0.6)
    return head


def mask_of(kind: str, rows: int) -> Tensor | None:
    """Random masks with a legal action for each choice."""
    if kind not in MASKED:
        return None
    mask = torch.rand((rows, MASKED[kind]), generator=generator(7)) < 0.5
    for part in mask.split([5] if kind == "discrete" else [2, 4, 3], -1):
        part[:, -1] |= ~part.any(-1)
    return mask


def twin(kind: str, head: Any, latent: Tensor, mask: Tensor | None) -> list[Any]:
    """torch's own distributions: one for each action dimension that is chosen by itself."""
    out = head.linear(latent)
    if mask is not None:
        out = out.masked_fill(~mask, -1e9)
    if kind == "discrete":
        return [Categorical(logits=out)]
    if kind == "multi-discrete":
        return [Categorical(logits=part) for part in out.split([2, 4, 3], -1)]
    if kind == "multi-binary":
        return [Independent(Bernoulli(logits=out), 1)]
    if kind == "gaussian":
        return [Independent(Normal(out, head.log_std.exp().expand_as(out)), 1)]
    variance = torch.einsum("nf,fa->na", latent.detach() ** 2, (2 * head.log_std).exp())
    return [Independent(Normal(out, (variance + 1e-6).sqrt()), 1)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_entropies_and_their_gradients_are_those_of_torch_distributions(kind: str, masked: bool) -> None:
    head, latent = head_of(kind), torch.randn((40, FEATURES), generator=generator())
    mask = mask_of(kind, 40) if masked else None
    with torch.no_grad():
        actions = head.sample(latent, head.noise(1, 40, generator(3))[0], mask)
    ours = head.evaluate_actions(latent, actions, mask)
    choices = twin(kind, head, latent, mask)
    parts = actions.unbind(-1) if kind == "multi-discrete" else [actions]
    parts = [part.float() for part in parts] if kind == "multi-binary" else parts
    theirs = (
        sum(choice.log_prob(part) for choice, part in zip(choices, parts, strict=True)),
        sum(choice.entropy() for choice in choices),
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == (40,) and mine.dtype == torch.float32
        assert torch.allclose(mine, other, atol=2e-5, rtol=1e-5)
        gradients = [
            torch.autograd.grad(x.sum(), list(head.parameters()), retain_graph=True, allow_unused=True) for x in (mine, other)
        ]
        for a, b in zip(*gradients, strict=True):
            none = torch.zeros(())
            assert torch.allclose(none if a is None else a, none if b is None else b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["discrete", "multi-discrete", "multi-binary"])
def test_actions_are_drawn_as_often_as_their_probability_says(kind: str, masked: bool) -> None:
    draws, head = 20_000, head_of(kind)
    latent = torch.randn((1, FEATURES), generator=generator(5)).expand(draws, -1)
    mask = mask_of(kind, 1) if masked else None
    with torch.no_grad():
        actions = head.sample(latent, head.noise(1, draws, generator(11))[0], None if mask is None else mask.expand(draws, -1))
        choices = twin(kind, head, latent[:1], mask)
    if kind == "multi-binary":
        chances = choices[0].base_dist.probs[0]
        pairs = [(torch.stack([1 - p, p]), actions[:, i]) for i, p in enumerate(chances)]
    else:
        columns = [actions] if kind == "discrete" else list(actions.unbind(-1))
        pairs = [(choice.probs[0], column) for choice, column in zip(choices, columns, strict=True)]
    for probabilities, column in pairs:
        expected = probabilities * draws
        counts = torch.bincount(column, minlength=len(expected)).float()
        assert counts[expected < 1e-3].sum() == 0  # the illegal ones
        possible = expected >= 1e-3
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 25  # at most 4 degrees of freedom: less than one in ten thousand


@pytest.mark.parametrize("kind", ["gaussian", "gsde"])
def test_continuous_actions_have_the_mean_and_std_of_their_log_probs(kind: str) -> None:
    draws, head = 20_000, head_of(kind)
    latent = torch.randn((1, FEATURES), generator=generator(5)).expand(draws, -1)
    with torch.no_grad():
        actions = head.sample(latent, head.noise(1, draws, generator(11))[0], None)
        normal = twin(kind, head, latent[:1], None)[0].base_dist
        assert torch.equal(head.sample(latent[:1], None, None), normal.mean)
    assert ((actions.mean(0) - normal.mean[0]).abs() < 5 * normal.stddev[0] / draws**0.5).all()
    assert torch.allclose(actions.std(0), normal.stddev[0], rtol=0.03)


@pytest.mark.parametrize("kind", ["discrete", "multi-discrete"])
def test_no_noise_makes_an_illegal_action_and_illegal_ones_have_finite_log_probs(kind: str) -> None:
    head, latent, mask = head_of(kind), 50 * torch.randn((64, FEATURES), generator=generator()), mask_of(kind, 64)
    assert mask is not None
    sizes = [5] if kind == "discrete" else [2, 4, 3]
    for noise in (head.noise(1, 64, generator())[0], torch.where(mask, -1e30, torch.inf)):
        actions = head.sample(latent, noise, mask).reshape(64, -1)
        for part, chosen in zip(mask.split(sizes, -1), actions.unbind(-1), strict=True):
            assert part.gather(-1, chosen[:, None]).all()
    assert torch.equal(head.sample(latent, None, mask), head.sample(latent, torch.zeros(()), mask))
    actions[:, 0] = mask[:, : sizes[0]].float().argmin(-1)
    logprobs, entropies = head.evaluate_actions(latent, actions[:, 0] if kind == "discrete" else actions, mask)
    assert logprobs.isfinite().all() and entropies.isfinite().all()
    (logprobs.sum() + entropies.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("kind", "width"),
    [("discrete", (5,)), ("multi-discrete", (9,)), ("multi-binary", (4,)), ("gaussian", (3,)), ("gsde", (6, 3))],
)
def test_noise_has_an_entry_for_each_step_and_sub_environment(kind: str, width: tuple[int, ...]) -> None:
    noise = head_of(kind).noise(7, 2, generator())
    assert len(noise) == 7 and all(noise[t].shape == (2, *width) for t in range(7))
    again = head_of(kind).noise(7, 2, generator())
    assert all(torch.equal(noise[t], again[t]) for t in range(7))


@pytest.mark.parametrize(("every", "changes"), [(-1, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (4, [4])])
def test_state_dependent_noise_is_held_for_n_steps(every: int, changes: list[int]) -> None:
    noise = action_head(spaces.Box(-1, 1, (2,)), FEATURES, use_sde=True, sde_sample_freq=every).noise(6, 1, generator())
    assert [t for t in range(1, 6) if not torch.equal(noise[t], noise[t - 1])] == changes


# Observations

OBSERVATIONS: list[tuple[Any, Any, list[float]]] = [
    (spaces.Discrete(4), [2, 0], [0, 0, 1, 0]),
    (spaces.Discrete(3, start=5), [7, 5], [0, 0, 1]),
    (spaces.MultiDiscrete([2, 3]), [[1, 2], [0, 0]], [0, 1, 0, 0, 1]),
    (spaces.MultiDiscrete([[2, 2], [2, 2]]), [[[0, 1], [1, 0]], [[0, 0], [0, 0]]], [1, 0, 0, 1, 0, 1, 1, 0]),
    (spaces.MultiBinary(3), [[1, 0, 1], [0, 0, 0]], [1, 0, 1]),
    (spaces.MultiBinary((2, 2)), [[[1, 0], [0, 1]], [[0, 0], [0, 0]]], [1, 0, 0, 1]),
    (spaces.Box(0, 9, (2, 2), dtype=numpy.float64), [[[1, 2], [3, 4]], [[0, 0], [0, 0]]], [1, 2, 3, 4]),
    (spaces.Box(0, 9, (2,), dtype=numpy.int64), [[7, 8], [0, 0]], [7, 8]),
]


@pytest.mark.parametrize(("space", "values", "features"), OBSERVATIONS, ids=lambda value: str(value)[:40])
def test_observations_become_features_of_the_right_width(space: Any, values: Any, features: list[float]) -> None:
    policy = ControlPolicy({"obs": space}, spaces.Discrete(2))
    prepared = policy.prepare({"obs": numpy.array(values, dtype=space.dtype)})
    assert policy.extractor(prepared)[0].tolist() == features
    assert policy.layers.policy[0].in_features == len(features) == policy.extractor.features_dim


def test_a_dict_is_its_parts_in_order_without_the_mask() -> None:
    parts = {"b": spaces.Discrete(3), "a": VECTOR, "action_mask": spaces.MultiBinary(2)}
    policy = ControlPolicy(parts, spaces.Discrete(2))
    observations = {"a": numpy.array([[5.0, 6.0, 7.0]]), "action_mask": numpy.array([[1, 0]]), "b": numpy.array([1])}
    prepared = policy.prepare(observations)
    assert policy.extractor(prepared).tolist() == [[0, 1, 0, 5, 6, 7]]
    assert prepared["action_mask"].dtype == torch.bool
    assert [int(policy.predict(observations, noise_from=generator(i))[0][0]) for i in range(20)] == [0] * 20


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.float32])
def test_images_are_the_same_with_their_channels_first_or_last(dtype: Any) -> None:
    high = 255 if dtype == numpy.uint8 else 1
    first, last = ({"obs": spaces.Box(0, high, shape, dtype=dtype)} for shape in ((3, 40, 44), (40, 44, 3)))
    torch.manual_seed(0)
    ours, theirs = Extractor(first, images=True), Extractor(last, images=True)
    theirs.load_state_dict(ours.state_dict())
    numbers = torch.rand((2, 3, 40, 44), generator=generator())
    images = (255 * numbers).to(torch.uint8) if dtype == numpy.uint8 else numbers
    features = ours({"obs": images})
    assert features.shape == (2, 512) and features.std() > 0
    assert torch.allclose(features, theirs({"obs": images.permute(0, 2, 3, 1)}), atol=1e-5)
    # Plain convolutions over numbers from 0 to 1.
    cnn = ours.cnns["obs"]
    plain = images.float() / 255 if dtype == numpy.uint8 else images
    assert torch.allclose(features, cnn.linear(cnn.layers(plain).flatten(1)).relu(), atol=1e-5)


def test_images_beside_numbers_share_the_features() -> None:
    parts = {"camera": spaces.Box(0, 255, (36, 36, 1), dtype=numpy.uint8), "speed": VECTOR}
    for kind, width in {"MultiInputPolicy": 512 + 3, "MlpPolicy": 36 * 36 + 3}.items():  # as in Stable-Baselines3
        assert ControlPolicy(parts, spaces.Discrete(2), kind=kind).extractor.features_dim == width
    ControlPolicy({"obs": spaces.Box(-1, 1, (3,))}, spaces.Discrete(2), kind="MultiInputPolicy")  # needs no image


def test_images_of_bytes_are_fractions_and_integers_can_be_normalized() -> None:
    image = spaces.Box(0, 255, (36, 36, 1), dtype=numpy.uint8)
    features = Extractor({"obs": image}, images=False)({"obs": torch.full((1, 36, 36, 1), 51, dtype=torch.uint8)})
    torch.testing.assert_close(features, torch.full((1, 36 * 36), 0.2))
    parts = {"count": spaces.Box(0, 1000, (3,), dtype=numpy.int64), "image": image}
    policy = ControlPolicy(parts, spaces.Discrete(2), normalize=True)
    assert set(policy.moments) == {"count"}
    seen = numpy.array([[1, 2, 3], [3, 8, 1]])
    prepared = policy.prepare({"count": seen}, learn=True)["count"]
    torch.testing.assert_close(prepared, torch.tensor([[-1.0, -1, 1], [1, 1, -1]]), atol=1e-3, rtol=0)


def test_a_board_is_seen_cell_by_cell() -> None:
    """Small float boxes [H, W, C] keep their size: moving a stone by a cell moves the last convolution's output by one."""
    extractor = Extractor({"obs": spaces.Box(0, 1, (9, 9, 2), dtype=numpy.float32)}, images=True)
    assert extractor.features_dim == 256
    board = extractor.cnns["obs"]
    here, there = torch.zeros(1, 9, 9, 2), torch.zeros(1, 9, 9, 2)
    here[0, 4, 3, 1] = there[0, 4, 4, 1] = 1.0
    first, second = (board.layers(values.permute(0, 3, 1, 2)) for values in (here, there))
    assert first.shape == (1, 32, 9, 9)
    inside = slice(3, 6)  # three convolutions away from the edge
    torch.testing.assert_close(first[..., inside, 3:5], second[..., inside, 4:6])
    assert not torch.allclose(extractor({"obs": here}), extractor({"obs": there}))


# The network as a whole


@pytest.mark.parametrize("kind", ["MlpPolicy", "MlpLstmPolicy"])
def test_layers_start_orthogonal_with_the_gains_of_the_original(kind: str) -> None:
    policy = ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), kind=kind)
    hidden = [layer for tower in (policy.layers.policy, policy.layers.value) for layer in tower if isinstance(layer, nn.Linear)]
    gains = [(layer, 2**0.5) for layer in hidden] + [(policy.head.linear, 0.01), (policy.value_head, 1.0)]
    assert len(gains) == 6
    for layer, gain in gains:
        singular = torch.linalg.svdvals(layer.weight.detach())
        assert torch.allclose(singular, torch.tensor(gain), rtol=1e-4), layer
        assert not layer.bias.any()
    plain = ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), config=NetworkConfig(ortho_init=False))
    assert torch.linalg.svdvals(plain.head.linear.weight.detach()).max() > 0.1


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    same, again, other = (ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(same.value_head.weight, again.value_head.weight)
    assert not torch.equal(same.value_head.weight, other.value_head.weight)


@pytest.mark.parametrize("kind", ["MlpPolicy", "MlpLstmPolicy"])
def test_a_shared_network_is_one_tower_and_a_separate_one_two(kind: str) -> None:
    def policy(share: bool) -> ControlPolicy:
        config = NetworkConfig(share=share, net_arch=[8], lstm_hidden_size=5)
        return ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), config=config, kind=kind)

    def moved_by(loss: str) -> set[int]:
        model.zero_grad(set_to_none=True)
        view = model.evaluate(a_batch(model))
        getattr(view, loss).sum().backward()
        return {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.any())}

    lstm = 4 * 5 * (3 + 5 + 2) if "Lstm" in kind else 0
    trunk = lstm + (5 if lstm else 3) * 8 + 8
    for share, trunks in ((True, 1), (False, 2)):
        model = policy(share)
        assert sum(p.numel() for _, p in model.named_parameters_to_train()) == trunks * trunk + (8 * 4 + 4) + (8 + 1)
        both = moved_by("logprobs_BT") & moved_by("values_BT")
        assert bool(both) == share
    with refused("one shared trunk cannot have different widths"):
        ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), config=NetworkConfig(share=True, net_arch={"pi": [4], "vf": [8]}))


def test_normalized_observations_follow_their_running_mean_and_variance(tmp_path: Path) -> None:
    space = {"obs": spaces.Box(-9, 9, (2,)), "count": spaces.Discrete(3)}
    policy = ControlPolicy(space, spaces.Discrete(2), normalize=True)
    seen = numpy.array([[1.0, 10.0], [3.0, 10.0], [8.0, 16.0]], dtype=numpy.float32)
    prepared = [policy.prepare({"obs": rows, "count": numpy.zeros(len(rows))}, learn=True) for rows in (seen[:2], seen[2:])]
    # Two batches and a start of weight 0.0001 at mean 0 and variance 1, pooled by hand.
    weights = numpy.array([1e-4, 1, 1, 1])[:, None]
    values = numpy.vstack([[[0, 0]], seen.astype(numpy.float64)])
    mean = (weights * values).sum(0) / weights.sum()
    variance = ((weights * (values - mean) ** 2).sum(0) + 1e-4) / weights.sum()
    moments = policy.moments["obs"]
    assert moments.mean.tolist() == pytest.approx(mean.tolist(), rel=1e-9)
    assert moments.variance.tolist() == pytest.approx(variance.tolist(), rel=1e-9)
    assert prepared[1]["obs"][0].tolist() == pytest.approx(((seen[2] - mean) / numpy.sqrt(variance + 1e-8)).tolist(), rel=1e-5)
    far = policy.prepare({"obs": numpy.array([[1e9, -1e9]], dtype=numpy.float32), "count": numpy.zeros(1)})
    assert far["obs"].tolist() == [[10, -10]] and set(policy.moments) == {"obs"}
    policy.save(tmp_path)
    other = ControlPolicy(space, spaces.Discrete(2), normalize=True, seed=9)
    other.load_extras(tmp_path)
    assert torch.equal(other.moments["obs"].variance, moments.variance) and other.moments["obs"].count == moments.count
    one = {"obs": seen, "count": numpy.ones(3)}
    assert torch.equal(
        other.values(other.prepare(one), {}, episode_starts=torch.zeros(3)),
        policy.values(policy.prepare(one), {}, episode_starts=torch.zeros(3)),
    )


def test_the_users_network_makes_the_features() -> None:
    class Own(nn.Module):
        features_dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, observation: Tensor) -> Tensor:
            return self.layer(observation)

    own = Own()
    policy = ControlPolicy({"obs": VECTOR}, spaces.Discrete(2), extractor=own)
    assert policy.layers.policy[0].in_features == 4
    assert any(parameter is own.layer.weight for _, parameter in policy.named_parameters_to_train())
    with refused("your network needs a features_dim"):
        ControlPolicy({"obs": VECTOR}, spaces.Discrete(2), extractor=nn.Identity())


# Recurrent state

B, T, H = 3, 9, 5


def a_batch(policy: ControlPolicy, *, starts: list[tuple[int, int]] = ()) -> Batch:  # type: ignore[assignment]
    """Random observations and actions; episodes begin at `starts` (row, step), rows from a state that is not empty."""
    rng = generator(2)
    state = {name: torch.randn((B, 1, H), generator=rng) for name in policy.initial_state(B)}
    starts_BT = torch.zeros((B, T), dtype=torch.bool)
    for row, step in starts:
        starts_BT[row, step] = True
    recurrent = {**state, "state/episode_starts": starts_BT} if state else {}
    zeros = torch.zeros(B, T)
    return Batch(
        observations={"obs": torch.randn((B, T, 3), generator=rng), **recurrent},
        actions_BT=torch.randint(4, (B, T), generator=rng),
        mask_BT=torch.ones((B, T), dtype=torch.bool),
        logprobs_BT=zeros,
        values_BT=zeros,
        rewards_BT=zeros,
        ends_BT=zeros.bool(),
        bootstrap_BT=zeros,
        row_size=T,
    )


def recurrent(*, share: bool = False) -> ControlPolicy:
    config = NetworkConfig(share=share, net_arch=[8], lstm_hidden_size=H, ortho_init=False)
    policy = ControlPolicy({"obs": VECTOR}, spaces.Discrete(4), config=config, kind="MlpLstmPolicy", seed=3)
    assert policy.reads_whole_rows
    return policy


def one_by_one(policy: ControlPolicy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and values by an LSTM cell that is stepped, and emptied where an episode begins."""
    views: list[list[Tensor]] = [[], []]
    for which, lstm in enumerate((policy.lstm.lstm, policy.critic_lstm.lstm)):
        names = list(policy.initial_state(B))[-2 * which :][:2]
        h, c = (batch.observations[name][:, 0] for name in names)
        for t in range(T):
            alive = (~batch.observations["state/episode_starts"][:, t, None]).float()
            observation = batch.observations["obs"][:, t]
            gates = observation @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + (h * alive) @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c * alive + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if which == 0:
                logits = policy.head.linear(policy.layers.policy(h))
                views[0].append(Categorical(logits=logits).log_prob(batch.actions_BT[:, t]))
            else:
                views[1].append(policy.value_head(policy.layers.value(h)).squeeze(-1))
    return torch.stack(views[0], 1), torch.stack(views[1], 1)


STARTS = {"none": [], "first": [(0, 0), (1, 0), (2, 0)], "middle": [(0, 4), (2, 0), (2, 1), (2, 8), (0, 5)]}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("starts", STARTS)
def test_a_row_at_once_is_a_row_step_by_step(starts: str, share: bool) -> None:
    policy = recurrent(share=share)
    batch = a_batch(policy, starts=STARTS[starts])
    view, slow = policy.evaluate(batch), one_by_one(policy, batch)
    gradients = []
    for mine, other in zip((view.logprobs_BT, view.values_BT), slow, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)
    weights = torch.randn((2, B, T), generator=generator(8))
    for logprobs, values in ((view.logprobs_BT, view.values_BT), slow):
        policy.zero_grad(set_to_none=True)
        (weights[0] * logprobs + weights[1] * values).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_acting_carries_the_state_that_evaluating_does() -> None:
    policy = recurrent()
    batch = a_batch(policy, starts=STARTS["middle"])
    state = {name: batch.observations[name][:, 0] for name in policy.initial_state(B)}
    view = policy.evaluate(batch)
    for t in range(T):
        observation, starts = {"obs": batch.observations["obs"][:, t]}, batch.observations["state/episode_starts"][:, t]
        assert torch.allclose(policy.values(observation, state, episode_starts=starts), view.values_BT[:, t], atol=1e-5)
        _, state = policy.act(observation, state, episode_starts=starts)
    assert set(state) == set(policy.initial_state(B))


def test_what_was_before_an_episode_does_not_reach_it() -> None:
    policy = recurrent()
    batch = a_batch(policy, starts=[(0, 4), (1, 4), (2, 4)])
    before = policy.evaluate(batch)
    batch.observations["obs"][:, :4] += 100.0
    for name in policy.initial_state(B):
        batch.observations[name] = batch.observations[name] + 3.0
    after = policy.evaluate(batch)
    assert torch.equal(before.logprobs_BT[:, 4:], after.logprobs_BT[:, 4:])
    assert torch.equal(before.values_BT[:, 4:], after.values_BT[:, 4:])
    assert not torch.allclose(before.values_BT[:, :4], after.values_BT[:, :4])
