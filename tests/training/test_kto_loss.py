"""kto_loss by hand, by a plain-Python twin, and by the laws of its formula."""

import math

import pytest
import torch

from slmfast.training.kto_loss import kto_loss


def by_definition(policy, reference, policy_kl, reference_kl, labels, beta, good, bad, groups):
    """The formula in plain Python: a loop over groups and one over samples."""
    losses, points = [], []
    for group in groups:
        point = max(0.0, sum(policy_kl[i] - reference_kl[i] for i in group) / len(group))
        points.append(point)
        for i in group:
            gain = policy[i] - reference[i]
            margin = gain - point if labels[i] else point - gain
            losses.append((good if labels[i] else bad) * (1 - 1 / (1 + math.exp(-beta * margin))))
    return losses, points


def random_logps(n: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_by_hand():
    policy, reference = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -18.0])  # r = 2, -2
    policy_kl, reference_kl = torch.tensor([-30.0, -31.0]), torch.tensor([-31.0, -32.0])  # z0 = 1
    losses, z0 = kto_loss(policy, reference, policy_kl, reference_kl, [True, False], undesirable_weight=1.5)
    assert z0.tolist() == [1.0]
    # 1 - sigmoid(0.1) = 0.4750208; 1.5 * (1 - sigmoid(0.3)) = 1.5 * 0.4255575
    assert losses.tolist() == pytest.approx([0.4750208, 0.6383362], abs=1e-6)


@pytest.mark.parametrize(
    ("n", "size", "groups"),
    [
        (8, 4, [range(0, 4), range(4, 8)]),
        (10, 4, [range(0, 4), range(4, 8), range(8, 10)]),
        (9, 4, [range(0, 4), range(4, 9)]),  # a last group of one joins the group before it
        (5, None, [range(0, 5)]),
        (1, 4, [range(0, 1)]),
        (3, 2, [range(0, 3)]),
    ],
)
def test_equals_its_definition(n, size, groups):
    logps = random_logps(n, seed=n)
    labels = [i % 3 != 1 for i in range(n)]
    losses, z0 = kto_loss(
        *logps, torch.tensor(labels), beta=0.4, desirable_weight=0.6, undesirable_weight=1.7, group_size=size
    )
    expected, points = by_definition(*(x.tolist() for x in logps), labels, 0.4, 0.6, 1.7, groups)
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert z0.tolist() == pytest.approx(points, abs=1e-12)


def test_apo_zero_has_no_reference_point():
    """By TRL's formulas: 1 - sigmoid(beta r) where desirable, sigmoid(beta r) where not."""
    policy, reference = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -18.0])  # r = 2, -2
    far = torch.tensor([9.0, 9.0])
    losses, z0 = kto_loss(
        policy, reference, far, -far, [True, False], undesirable_weight=1.5, loss_type="apo_zero_unpaired"
    )
    assert z0.tolist() == [0.0]
    # 1 - sigmoid(0.2) = 0.4501660; 1.5 * sigmoid(-0.2) = 1.5 * 0.4501660
    assert losses.tolist() == pytest.approx([0.4501660, 0.6752490], abs=1e-6)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_its_loss(label):
    losses, z0 = kto_loss(*random_logps(6, seed=3), torch.full((6,), label), group_size=3)
    assert losses.shape == (6,) and z0.shape == (2,)
    assert ((losses > 0) & (losses < 1)).all()


def test_no_samples_give_no_losses():
    losses, z0 = kto_loss(*random_logps(0, seed=0), torch.zeros(0, dtype=torch.bool), group_size=4)
    assert losses.shape == (0,) and z0.shape == (0,)


def test_the_reference_point_is_never_negative():
    zero = torch.zeros(4)
    _, z0 = kto_loss(zero, zero, torch.full((4,), -9.0), torch.full((4,), -3.0), torch.ones(4))
    assert z0.tolist() == [0.0]


def test_the_reference_point_has_no_gradient_and_the_reward_has_that_of_the_formula():
    policy, reference, policy_kl, reference_kl = random_logps(4, seed=5)
    policy.requires_grad_(), policy_kl.requires_grad_()
    labels = torch.tensor([1, 0, 1, 0])
    losses, z0 = kto_loss(policy, reference, policy_kl, reference_kl, labels, beta=0.2, undesirable_weight=2.0)
    losses.sum().backward()
    assert policy_kl.grad is None and not z0.requires_grad
    probability = torch.sigmoid(0.2 * (policy.detach() - reference - z0))
    slope = 0.2 * probability * (1 - probability)
    assert torch.allclose(policy.grad, torch.where(labels.bool(), -slope, 2.0 * slope), atol=1e-12)


def test_a_bool_label_is_a_0_or_1_label():
    logps = random_logps(4, seed=7)
    as_bool = kto_loss(*logps, torch.tensor([True, False, True, True]))
    as_int = kto_loss(*logps, [1, 0, 1, 1])
    assert torch.equal(as_bool[0], as_int[0]) and torch.equal(as_bool[1], as_int[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 1])}, "neither 0 nor 1"),
        ({"labels": ["yes", "no", "yes", "no"]}, "neither 0 nor 1"),
        ({"labels": [True, None, False, True]}, "neither 0 nor 1"),
        ({"labels": torch.tensor([0, 1])}, "one length"),
        ({"loss_type": "dpo"}, "loss_type is 'dpo'"),
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": "2"}, "group_size is '2'"),
        ({"beta": -1}, "beta is -1"),
        ({"beta": "0.1"}, "beta is '0.1'"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight is nan"),
    ],
)
def test_misuse_is_named(change, message):
    arguments = {"labels": torch.tensor([0, 1, 0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        kto_loss(*random_logps(4, seed=1), **arguments)
