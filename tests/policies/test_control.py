"""Networks and action heads for control against torch.distributions, one step at a time, and numbers by hand."""

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
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=numpy.uint8)
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(5), {}),
    "multi-discrete": (spaces.MultiDiscrete([2, 4, 3]), {}),
    "multi-binary": (spaces.MultiBinary(4), {}),
    "gaussian": (spaces.Box(-1, 1, (3,)), {"log_std_init": -0.7}),
    "gsde": (spaces.Box(-1, 1, (3,)), {"log_std_init": -0.7, "use_sde": True}),
}
SIZES = {"discrete": [5], "multi-discrete": [2, 4, 3]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(kind: str) -> Any:
    space, settings = HEADS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = action_head(space, FEATURES, NetworkConfig(**settings))
        for parameter in head.parameters():
            nn.init.normal_(parameter, -0.3 if parameter is getattr(head, "log_std", None) else 0.0, 0.6)
    return head


def policy_of(kind: str = "MlpPolicy", observation: Any = VECTOR, actions: int = 4, **settings: Any) -> ControlPolicy:
    parts = observation if isinstance(observation, dict) else {"obs": observation}
    extras = {name: settings.pop(name) for name in ("seed", "normalize", "extractor") if name in settings}
    return ControlPolicy(parts, spaces.Discrete(actions), kind=kind, config=NetworkConfig(**settings), **extras)


def mask_of(kind: str, rows: int) -> Tensor | None:
    """Random masks with a legal action for each choice."""
    if kind not in SIZES:
        return None
    mask = torch.rand((rows, sum(SIZES[kind])), generator=generator(7)) < 0.5
    for part in mask.split(SIZES[kind], -1):
        part[:, -1] |= ~part.any(-1)
    return mask


def twin(kind: str, head: Any, latent: Tensor, mask: Tensor | None) -> list[Any]:
    """torch's own distributions: one for each action dimension that is chosen by itself."""
    out = head.linear(latent) if mask is None else head.linear(latent).masked_fill(~mask, -1e9)
    if kind in SIZES:
        return [Categorical(logits=part) for part in out.split(SIZES[kind], -1)]
    if kind == "multi-binary":
        return [Independent(Bernoulli(logits=out), 1)]
    if kind == "gaussian":
        return [Independent(Normal(out, head.log_std.exp().expand_as(out)), 1)]
    variance = torch.einsum("nf,fa->na", latent.detach() ** 2, (2 * head.log_std).exp())
    return [Independent(Normal(out, (variance + 1e-6).sqrt()), 1)]


@pytest.mark.parametrize(("kind", "masked"), [*((kind, False) for kind in HEADS), *((kind, True) for kind in SIZES)])
def test_log_probs_entropies_and_their_gradients_are_those_of_torch_distributions(kind: str, masked: bool) -> None:
    head, latent = head_of(kind), torch.randn((40, FEATURES), generator=generator())
    mask = mask_of(kind, 40) if masked else None
    with torch.no_grad():
        actions = head.sample(latent, head.noise(1, 40, generator(3))[0], mask)
    ours = head.evaluate_actions(latent, actions, mask)
    choices = twin(kind, head, latent, mask)
    parts = [part.float() for part in (actions.unbind(-1) if kind == "multi-discrete" else [actions])]
    logprobs = sum(choice.log_prob(part) for choice, part in zip(choices, parts, strict=True))
    parameters = list(head.parameters())
    for mine, other in zip(ours, (logprobs, sum(choice.entropy() for choice in choices)), strict=True):
        assert mine.shape == (40,) and mine.dtype == torch.float32
        assert torch.allclose(mine, other, atol=2e-5, rtol=1e-5)
        found = [torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True) for x in (mine, other)]
        for a, b in zip(*([torch.zeros(()) if g is None else g for g in side] for side in found), strict=True):
            assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)


def drawn(kind: str, masked: bool = False, draws: int = 20_000) -> tuple[Tensor, list[Any]]:
    """Actions in one state, and the distributions that they should be of."""
    head, latent = head_of(kind), torch.randn((1, FEATURES), generator=generator(5))
    mask = mask_of(kind, 1) if masked else None
    masks = None if mask is None else mask.expand(draws, -1)
    with torch.no_grad():
        actions = head.sample(latent.expand(draws, -1), head.noise(1, draws, generator(11))[0], masks)
        choices = twin(kind, head, latent, mask)
        if kind not in SIZES and kind != "multi-binary":
            assert torch.equal(head.sample(latent, None, None), choices[0].base_dist.mean)
    return actions, choices


@pytest.mark.parametrize("kind", [*SIZES, "multi-binary"])
@pytest.mark.parametrize("masked", [False, True])
def test_actions_are_drawn_as_often_as_their_probability_says(kind: str, masked: bool) -> None:
    actions, choices = drawn(kind, masked)
    columns = actions.reshape(len(actions), -1).unbind(-1)
    chances = [choice.probs[0] for choice in choices] if kind in SIZES else choices[0].base_dist.probs[0]
    for chance, column in zip(chances, columns, strict=True):
        expected = len(actions) * (chance if kind in SIZES else torch.stack([1 - chance, chance]))
        counts = torch.bincount(column, minlength=len(expected)).float()
        possible = expected >= 1e-3
        assert counts[~possible].sum() == 0  # the illegal ones
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 25  # at most 4 degrees of freedom: less than one in ten thousand


@pytest.mark.parametrize("kind", ["gaussian", "gsde"])
def test_continuous_actions_have_the_mean_and_std_of_their_log_probs(kind: str) -> None:
    actions, (choice,) = drawn(kind)
    mean, std = choice.base_dist.mean[0], choice.base_dist.stddev[0]
    assert ((actions.mean(0) - mean).abs() < 5 * std / len(actions) ** 0.5).all()
    assert torch.allclose(actions.std(0), std, rtol=0.03)


@pytest.mark.parametrize("kind", SIZES)
def test_no_noise_makes_an_illegal_action_and_illegal_ones_have_finite_log_probs(kind: str) -> None:
    head, latent, mask = head_of(kind), 50 * torch.randn((64, FEATURES), generator=generator()), mask_of(kind, 64)
    assert mask is not None
    for noise in (head.noise(1, 64, generator())[0], torch.where(mask, -1e30, torch.inf)):
        actions = head.sample(latent, noise, mask)
        columns = actions.reshape(64, -1)
        for part, chosen in zip(mask.split(SIZES[kind], -1), columns.unbind(-1), strict=True):
            assert part.gather(-1, chosen[:, None]).all()
    assert torch.equal(head.sample(latent, None, mask), head.sample(latent, torch.zeros(()), mask))
    columns[:, 0] = mask[:, : SIZES[kind][0]].float().argmin(-1)
    logprobs, entropies = head.evaluate_actions(latent, columns.reshape(actions.shape), mask)
    (logprobs.sum() + entropies.sum()).backward()
    assert all(x.isfinite().all() for x in (logprobs, entropies, *(parameter.grad for parameter in head.parameters())))


@pytest.mark.parametrize(("every", "changes"), [(-1, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (4, [4])])
def test_state_dependent_noise_is_held_for_n_steps(every: int, changes: list[int]) -> None:
    head = action_head(spaces.Box(-1, 1, (2,)), FEATURES, NetworkConfig(use_sde=True, sde_sample_freq=every))
    noise = head.noise(6, 1, generator())
    assert [t for t in range(1, 6) if not torch.equal(noise[t], noise[t - 1])] == changes


FOUR, PAIR = [[[1, 0], [1, 0]], [[0, 0], [0, 0]]], spaces.MultiDiscrete([[2, 2], [2, 2]])
OBSERVATIONS: list[tuple[Any, Any, list[float]]] = [
    (spaces.Discrete(4), [2, 0], [0, 0, 1, 0]),
    (spaces.Discrete(3, start=5), [7, 5], [0, 0, 1]),
    (spaces.MultiDiscrete([2, 3]), [[1, 2], [0, 0]], [0, 1, 0, 0, 1]),
    (PAIR, FOUR, [0, 1, 1, 0, 0, 1, 1, 0]),
    (spaces.MultiBinary(3), [[1, 0, 1], [0, 0, 0]], [1, 0, 1]),
    (spaces.MultiBinary((2, 2)), FOUR, [1, 0, 1, 0]),
    (spaces.Box(0, 9, (2, 2), dtype=numpy.float64), FOUR, [1, 0, 1, 0]),
    (spaces.Box(0, 9, (2,), dtype=numpy.int64), [[7, 8], [0, 0]], [7, 8]),
]


@pytest.mark.parametrize(("space", "values", "features"), OBSERVATIONS, ids=lambda value: str(value)[:40])
def test_observations_become_features_of_the_right_width(space: Any, values: Any, features: list[float]) -> None:
    policy = policy_of(observation=space)
    assert policy.extractor(policy.prepare({"obs": numpy.array(values, dtype=space.dtype)}))[0].tolist() == features
    assert policy.layers.policy[0].in_features == len(features) == policy.extractor.features_dim


def test_a_dict_is_its_parts_in_order_without_the_mask() -> None:
    policy = policy_of(observation={"b": spaces.Discrete(3), "a": VECTOR, "action_mask": spaces.MultiBinary(2)}, actions=2)
    observations = {"a": numpy.array([[5.0, 6.0, 7.0]]), "action_mask": numpy.array([[1, 0]]), "b": numpy.array([1])}
    prepared = policy.prepare(observations)
    assert policy.extractor(prepared).tolist() == [[0, 1, 0, 5, 6, 7]]
    assert prepared["action_mask"].dtype == torch.bool
    assert {int(policy.predict(observations, noise_from=generator(i))[0][0]) for i in range(20)} == {0}


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


def test_images_beside_numbers_share_the_features_and_integers_can_be_normalized() -> None:
    for kind, width in {"MultiInputPolicy": 512 + 3, "MlpPolicy": 36 * 36 + 3}.items():  # as in Stable-Baselines3
        assert policy_of(kind, {"camera": IMAGE, "speed": VECTOR}).extractor.features_dim == width
    policy_of("MultiInputPolicy", VECTOR)  # needs no image
    features = Extractor({"obs": IMAGE}, images=False)({"obs": torch.full((1, 36, 36, 1), 51, dtype=torch.uint8)})
    torch.testing.assert_close(features, torch.full((1, 36 * 36), 0.2))
    policy = policy_of(observation={"count": spaces.Box(0, 1000, (3,), dtype=numpy.int64), "image": IMAGE}, normalize=True)
    assert set(policy.moments) == {"count"}
    prepared = policy.prepare({"count": numpy.array([[1, 2, 3], [3, 8, 1]])}, learn=True)["count"]
    torch.testing.assert_close(prepared, torch.tensor([[-1.0, -1, 1], [1, 1, -1]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.uint16, numpy.int32, numpy.float32])
@pytest.mark.parametrize("shape", [(128,), (84, 84), (7, 7, 3), (20, 20, 3), (40, 40, 3), (3, 40, 40)], ids=str)
@pytest.mark.parametrize("high", [1, 255])
def test_the_first_layer_sees_images_and_bytes_between_0_and_1(dtype: Any, shape: tuple[int, ...], high: int) -> None:
    space = spaces.Box(0, high, shape, dtype=dtype)
    full = {"obs": torch.from_numpy(numpy.full((1, *shape), high, dtype=dtype))}
    is_plain = len(shape) < 3 and dtype in (numpy.int32, numpy.float32)  # numbers, which may be anything
    for spaces_of in ({"obs": space}, {"obs": space, "speed": VECTOR}):
        flat = Extractor(spaces_of, images=False)(full | {"speed": torch.zeros(1, 3)})
        assert flat[0, : space.shape[0]].tolist() == pytest.approx([float(high) if is_plain else 1.0] * space.shape[0])
        seen = [cnn.scale * high for cnn in Extractor(spaces_of, images=True).cnns.values()]
        assert seen == [1.0] * len(seen)
    normalized = Extractor({"obs": space}, images=False, normalized={"obs"})(full)
    assert normalized.max() == high


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("use_sde", [False, True])
def test_actions_are_float32_whatever_the_layers_compute_in(deterministic: bool, use_sde: bool) -> None:
    config, box = NetworkConfig(use_sde=use_sde), spaces.Box(-1, 1, (2,))
    policy = ControlPolicy({"obs": IMAGE}, box, kind="CnnPolicy", config=config, dtype=torch.bfloat16)
    prepared, starts = policy.prepare({"obs": numpy.zeros((1, 36, 36, 1), numpy.uint8)}), torch.ones(1, dtype=torch.bool)
    with policy.acting():
        noise = None if deterministic else policy.noise(1, 1, generator())[0]
        assert policy.act(prepared, {}, episode_starts=starts, noise=noise)[0].dtype == torch.float32


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


@pytest.mark.parametrize("kind", ["MlpPolicy", "MlpLstmPolicy"])
def test_layers_start_orthogonal_with_the_gains_of_the_original(kind: str) -> None:
    policy = policy_of(kind)
    hidden = [layer for tower in (policy.layers.policy, policy.layers.value) for layer in tower if isinstance(layer, nn.Linear)]
    gains = [(layer, 2**0.5) for layer in hidden] + [(policy.head.linear, 0.01), (policy.value_head, 1.0)]
    assert len(gains) == 6
    for layer, gain in gains:
        assert torch.allclose(torch.linalg.svdvals(layer.weight.detach()), torch.tensor(gain), rtol=1e-4), layer
        assert not layer.bias.any()
    assert torch.linalg.svdvals(policy_of(ortho_init=False).head.linear.weight.detach()).max() > 0.1


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    same, again, other = (policy_of(seed=seed).value_head.weight for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(same, again) and not torch.equal(same, other)


@pytest.mark.parametrize("kind", ["MlpPolicy", "MlpLstmPolicy"])
def test_a_shared_network_is_one_tower_and_a_separate_one_two(kind: str) -> None:
    def moved_by(model: ControlPolicy, loss: str) -> set[int]:
        model.zero_grad(set_to_none=True)
        getattr(model.evaluate(a_batch(model)), loss).sum().backward()
        return {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.any())}

    lstm = 4 * 5 * (3 + 5 + 2) if "Lstm" in kind else 0
    trunk = lstm + (5 if lstm else 3) * 8 + 8
    for share, trunks in ((True, 1), (False, 2)):
        model = policy_of(kind, share=share, net_arch=[8], lstm_hidden_size=5)
        assert sum(p.numel() for _, p in model.named_parameters_to_train()) == trunks * trunk + (8 * 4 + 4) + (8 + 1)
        assert bool(moved_by(model, "logprobs_BT") & moved_by(model, "values_BT")) == share
    with refused("one shared trunk cannot have different widths"):
        policy_of(share=True, net_arch={"pi": [4], "vf": [8]})


def test_normalized_observations_follow_their_running_mean_and_variance(tmp_path: Path) -> None:
    parts = {"obs": spaces.Box(-9, 9, (2,)), "count": spaces.Discrete(3)}
    policy, other = policy_of(observation=parts, normalize=True), policy_of(observation=parts, normalize=True, seed=9)
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
    other.load_extras(tmp_path)
    assert torch.equal(other.moments["obs"].variance, moments.variance) and other.moments["obs"].count == moments.count
    one, begins = {"obs": seen, "count": numpy.ones(3)}, torch.zeros(3)
    ours, theirs = (each.values(each.prepare(one), {}, episode_starts=begins) for each in (policy, other))
    assert torch.equal(ours, theirs)


B, T, H = 3, 9, 5


def a_batch(policy: ControlPolicy, *, starts: list[tuple[int, int]] = ()) -> Batch:  # type: ignore[assignment]
    """Random observations and actions; episodes begin at `starts` (row, step), rows from a state that is not empty."""
    rng = generator(2)
    state = {name: torch.randn((B, 1, H), generator=rng) for name in policy.initial_state(B)}
    starts_BT = torch.zeros((B, T), dtype=torch.bool)
    for row, step in starts:
        starts_BT[row, step] = True
    recurrent = {**state, "state/episode_starts": starts_BT} if state else {}
    zeros, names = torch.zeros(B, T), ("logprobs_BT", "values_BT", "rewards_BT", "bootstrap_BT")
    return Batch(
        observations={"obs": torch.randn((B, T, 3), generator=rng), **recurrent},
        actions_BT=torch.randint(4, (B, T), generator=rng),
        mask_BT=torch.ones((B, T), dtype=torch.bool),
        ends_BT=zeros.bool(),
        row_size=T,
        **dict.fromkeys(names, zeros),
    )


def recurrent(share: bool = False) -> ControlPolicy:
    return policy_of("MlpLstmPolicy", share=share, net_arch=[8], lstm_hidden_size=H, ortho_init=False, seed=3)


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
    policy = recurrent(share)
    batch, weights = a_batch(policy, starts=STARTS[starts]), torch.randn((2, B, T), generator=generator(8))
    view, slow = policy.evaluate(batch), one_by_one(policy, batch)
    gradients = []
    for logprobs, values in ((view.logprobs_BT, view.values_BT), slow):
        assert torch.allclose(logprobs, slow[0], atol=1e-5) and torch.allclose(values, slow[1], atol=1e-5)
        policy.zero_grad(set_to_none=True)
        (weights[0] * logprobs + weights[1] * values).sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-5, rtol=1e-4)
    state = {name: batch.observations[name][:, 0] for name in policy.initial_state(B)}  # acting carries the same one
    for t in range(T):
        observation, begins = {"obs": batch.observations["obs"][:, t]}, batch.observations["state/episode_starts"][:, t]
        assert torch.allclose(policy.values(observation, state, episode_starts=begins), view.values_BT[:, t], atol=1e-5)
        _, state = policy.act(observation, state, episode_starts=begins)
    assert policy.reads_whole_rows and set(state) == set(policy.initial_state(B))
