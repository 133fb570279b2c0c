"""Two ways to log-probs and entropies of completion tokens: the frozen head's hand-written gradient, and autograd."""

import pytest
import torch
from torch import Tensor, nn

from surefoot.policies.lm import token_logprobs as heads

N, D, V = 8 * heads.CHUNK + 90, 24, 61  # more than one chunk of either path, and a ragged last one


def hidden_and_actions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator, requires_grad=True), torch.randint(0, V, (N,), generator=generator)


def linear(*, trained: bool, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(D, V, bias=bias).requires_grad_(trained)


def by_hand(hidden: Tensor, actions: Tensor, head: nn.Linear, *, temperature: float, cap: float | None = None):
    z = head(hidden)
    z = z if cap is None else cap * torch.tanh(z / cap)
    distribution = torch.distributions.Categorical(logits=z / temperature)
    return distribution.log_prob(actions), distribution.entropy()


SETTINGS = [(False, False, None), (True, False, None), (True, True, None), (False, True, None), (False, False, 2.0)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize(("trained", "bias", "cap"), [*SETTINGS, (False, True, 2.0)])
def test_both_paths_and_the_definition_agree_in_value_and_gradient(trained, bias, cap, temperature):
    hidden, actions = hidden_and_actions()
    head = linear(trained=trained, bias=bias)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(2))
    found = heads.action_logprobs(hidden, actions, head=head, cap=cap, temperature=temperature)
    expected = by_hand(hidden, actions, head, temperature=temperature, cap=cap)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    wanted = [hidden, *(head.parameters() if trained else ())]
    gradients = [torch.autograd.grad((weights * logprobs).sum(), wanted) for logprobs, _ in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5 if one is gradients[0][0] else 1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_entropies_carry_a_gradient_only_when_asked_for(trained):
    hidden, actions = hidden_and_actions()
    head = linear(trained=trained)
    quiet = heads.action_logprobs(hidden, actions, head=head, cap=None, temperature=0.6)[1]
    assert not quiet.requires_grad
    loud = heads.action_logprobs(hidden, actions, head=head, cap=None, temperature=0.6, entropy_gradient=True)[1]
    (gradient,) = torch.autograd.grad(loud.sum(), hidden)
    (expected,) = torch.autograd.grad(by_hand(hidden, actions, head, temperature=0.6)[1].sum(), hidden)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_a_subclass_of_linear_keeps_its_own_forward():
    # Adapters and quantised layers are subclasses whose output is not hidden @ weight.T alone.
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    hidden, actions = hidden_and_actions()
    plain = linear(trained=False)
    doubled = Doubled(D, V, bias=False).requires_grad_(False)
    doubled.weight.copy_(plain.weight)
    logprobs, _ = heads.action_logprobs(hidden, actions, head=doubled, cap=None, temperature=1.0)
    assert torch.allclose(logprobs, by_hand(hidden, actions, plain, temperature=0.5)[0], atol=1e-5)


def test_logits_far_apart_stay_finite_and_no_completion_token_is_no_error():
    head = linear(trained=False)
    for one in (head, linear(trained=True)):
        empty = torch.zeros(0, D), torch.zeros(0, dtype=torch.long)
        found = heads.action_logprobs(*empty, head=one, cap=None, temperature=1.0)
        assert [len(column) for column in found] == [0, 0]
    hidden, actions = hidden_and_actions()
    hidden = (1e4 * hidden.detach()).requires_grad_()
    logprobs, entropies = heads.action_logprobs(hidden, actions, head=head, cap=None, temperature=0.1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert all(torch.isfinite(x).all() for x in (logprobs, entropies, gradient)) and (entropies > -1e-2).all()
