"""LogDensity: Pyro's own log joint, flat, batched by whatever works, and split in two."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model

from flowppl.errors import DimensionError, UnsupportedModelError
from flowppl.pyro import LogDensity

pytestmark = pytest.mark.usefixtures("float64")
DATA = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def everything(y, scale_data=1.0):
    """Sites of many shapes, out of the order of their names; plates, scales, masks and factors."""
    weights = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.5))
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1):
        z = pyro.sample("a", dist.Normal(loc.sum(-1), scale))
    with (
        pyro.plate("data", 4),
        poutine.scale(scale=scale_data),
        poutine.mask(mask=torch.tensor([True, True, True, False])),
    ):
        pyro.sample("y", dist.StudentT(4.0, z.sum(-2, keepdim=True) + weights[..., 0], 0.5), obs=y)
    pyro.factor("prior", -(corr**2).sum((-1, -2)))
    pyro.deterministic("total", z.sum((-1, -2)))


def reference(model, args, u, density):
    """Pyro's own potential, one row at a time."""
    _, potential, transforms, _ = initialize_model(model, args)
    rows = []
    for row in u:
        rows.append(-potential({name: v for name, v in density.unpack(row).items()}))
    assert sorted(transforms) == density.names
    return torch.stack(rows)


def how(density):
    return density._terms.__name__


def test_agrees_with_pyro():
    density = LogDensity(everything, (DATA, 2.0))
    u = torch.randn(5, density.dim)
    assert density.names == ["a", "corr", "loc", "scale", "w"] and density.dim == 8 + 3 + 2 + 1 + 2
    assert how(density) == "_by_vmap"
    assert torch.allclose(density.log_prob(u), reference(everything, (DATA, 2.0), u, density))
    assert torch.allclose(sum(density.split(u)), density.log_prob(u))


def test_split_is_prior_and_likelihood():
    density = LogDensity(everything, (DATA, 2.0))
    u = torch.randn(3, density.dim)
    other = LogDensity(everything, (DATA + 1.0, 2.0))
    assert torch.equal(density.split(u)[0], other.split(u)[0])
    assert not torch.allclose(density.split(u)[1], other.split(u)[1])
    for row, prior in zip(u, density.split(u)[0], strict=True):
        values = {name: v[0] for name, v in density.constrain(row[None]).items()}
        trace = poutine.trace(poutine.condition(everything, values)).get_trace(DATA, 2.0)
        likelihood = trace.log_prob_sum(lambda name, site: name in ("y", "prior"))
        joint = density.log_prob(row[None])[0]
        assert torch.allclose(prior, joint - likelihood)


def test_three_ways_agree():
    density = LogDensity(everything, (DATA,))
    u = torch.randn(4, density.dim)
    expected = density._by_row(u)
    for found in (density._by_vmap(u), density._by_plate(u)):
        assert torch.allclose(found[0], expected[0]) and torch.allclose(found[1], expected[1])
        assert set(found[2]) == set(expected[2])
        assert all(torch.allclose(found[2][k], v) and found[2][k].shape == v.shape for k, v in expected[2].items())


def test_score_is_the_gradient():
    density = LogDensity(everything, (DATA,))
    u = torch.randn(3, density.dim)
    value, score = density.value_and_score(u)
    assert not value.requires_grad and torch.allclose(value, density.log_prob(u))
    step = 1e-6 * torch.randn(density.dim)
    difference = density.log_prob(u + step) - density.log_prob(u - step)
    assert torch.allclose(difference, 2 * score @ step, rtol=1e-5, atol=1e-12)


def test_constrain_and_unpack():
    density = LogDensity(everything, (DATA,))
    u = torch.randn(2, 3, density.dim)
    values = density.constrain(u)
    shapes = {name: tuple(v.shape) for name, v in values.items()}
    assert shapes == {
        "a": (2, 3, 2, 4),
        "corr": (2, 3, 3, 3),
        "loc": (2, 3, 2),
        "scale": (2, 3),
        "w": (2, 3, 3),
        "total": (2, 3),
    }
    assert torch.allclose(values["scale"], density.unpack(u)["scale"].exp())
    assert torch.allclose(values["w"].sum(-1), torch.ones(2, 3))
    assert torch.equal(density.unpack(u)["a"].reshape(2, 3, 8), u[..., :8])  # C order, sorted names


def test_start():
    density = LogDensity(everything, (DATA,), init_loc_fn=init_to_value(values={"scale": torch.tensor(2.0)}))
    assert density.unpack(density.init)["scale"] == pytest.approx(math.log(2.0))
    draws = [LogDensity(everything, (DATA,), rng=torch.Generator().manual_seed(s)).init for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    LogDensity(everything, (DATA,), rng=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)


def branching(y):
    """Neither vmap nor a plate can follow an assertion on one value, or an item."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    offset = 1.0 if x.item() > 0 else 2.0
    pyro.sample("y", dist.Normal(x + offset, 1.0), obs=y)


def plated(y):
    """A plate can follow what vmap cannot: a check that the whole batch passes."""
    x = pyro.sample("x", dist.HalfNormal(1.0))
    assert bool((x > 0).all())
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize(("model", "way"), [(plated, "_by_plate"), (branching, "_by_row")])
def test_falls_back(model, way):
    y = DATA if model is plated else DATA[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        density = LogDensity(model, (y,))
    assert how(density) == way
    messages = [str(w.message) for w in caught if "cannot be evaluated on a batch" in str(w.message)]
    assert len(messages) == (way == "_by_row") and all("avoid .item()" in m for m in messages)
    u = torch.tensor([[-1.0], [0.5], [2.0]])
    assert torch.allclose(density.log_prob(u), reference(model, (y,), u, density))
    assert density.value_and_score(u)[1].shape == (3, 1)


def test_silent_disagreement_is_noticed():
    """Summing over all axes runs in a plate, and is wrong there; cloning to numpy fails under vmap."""

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        float(torch.zeros(()) + 0 * x.detach().sum())
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    with pytest.warns(UserWarning, match="runs once for each row"):
        density = LogDensity(model, (DATA[0],))
    assert how(density) == "_by_row"


def test_supports_that_depend_on_other_latents():
    def model():
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        pyro.sample("inside", dist.Uniform(0.0, high))

    density = LogDensity(model)
    u = torch.randn(200, 2)
    values = density.constrain(u)
    assert ((values["inside"] > 0) & (values["inside"] < values["high"])).all()
    # p(inside | high) times the Jacobian is the logistic density, whatever high is.
    expected = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + torch.nn.functional.logsigmoid(u[:, 1])
    assert torch.allclose(density.log_prob(u), expected + torch.nn.functional.logsigmoid(-u[:, 1]))


def test_improper_sites():
    def model():
        pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))

    density = LogDensity(model)
    u = torch.randn(3, 4)
    assert torch.allclose(density.log_prob(u), u[:, :2].sum(-1))


@pytest.mark.parametrize("way", ["_by_plate", "_by_row"])
def test_enumerated_sites_are_summed_out(way):
    @config_enumerate
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(p)).long()
            pyro.sample("y", dist.Normal(torch.where(k == 1, loc[..., 1], loc[..., 0]), 0.5), obs=y)

    density = LogDensity(model, (DATA,))
    assert density.names == ["loc", "p"]
    u = torch.randn(6, 3)
    assert how(density) == "_by_plate"
    density._terms = getattr(density, way)
    p = u[:, 2].sigmoid()
    each = torch.stack([dist.Normal(u[:, k : k + 1], 0.5).log_prob(DATA) for k in (0, 1)])
    weights = torch.stack([(1 - p).log(), p.log()])[..., None]
    likelihood = torch.logsumexp(each + weights, 0).sum(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(u[:, :2]).sum(-1) + dist.Beta(2.0, 2.0).log_prob(p) + (p * (1 - p)).log()
    assert torch.allclose(density.split(u)[0], prior)
    assert torch.allclose(density.split(u)[1], likelihood)


def test_nan_is_counted_and_rejected():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (x - 1.0).log())

    density = LogDensity(model, init_loc_fn=init_to_value(values={"x": torch.tensor(2.0)}))
    u = torch.tensor([[0.0], [2.0], [-3.0]])
    assert density.log_prob(u).tolist() == [-math.inf, pytest.approx(-2.0 - 0.5 * math.log(2 * math.pi)), -math.inf]
    assert int(density.num_nan(u)) == 2
    assert torch.equal(sum(density.split(u)), density.log_prob(u))


def test_parameters_of_the_model_are_live():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0))

    density = LogDensity(model)
    pyro.get_param_store()["loc"] = torch.tensor(3.0)
    assert density.log_prob(torch.tensor([[3.0]])).item() == pytest.approx(-0.5 * math.log(2 * math.pi))


def test_dtype_follows_the_model():
    torch.set_default_dtype(torch.float32)
    density = LogDensity(lambda: pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)))
    assert density.init.dtype == torch.float64


def no_density(kind):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if kind == "discrete":
            pyro.sample("k", dist.Categorical(torch.ones(3)))
        elif kind == "delta":
            pyro.sample("d", dist.Delta(x))
        elif kind == "sphere":
            pyro.sample("s", dist.ProjectedNormal(torch.ones(3)))
        elif kind == "subsample":
            with pyro.plate("rows", 10, subsample_size=2):
                pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2))

    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("discrete", r"'k' is discrete.*config_enumerate\(model\) and TraceEnum_ELBO.*hide=\['k'\]"),
        ("delta", r"use pyro.deterministic\('d', ...\)"),
        ("sphere", "'s' .ProjectedNormal.: .*reparametrise it with poutine.reparam"),
        ("subsample", "fails where 'rows' does not subsample: .*Pass all of the data"),
    ],
)
def test_unsupported_sites(kind, message):
    with pytest.raises(UnsupportedModelError, match=message):
        LogDensity(no_density(kind))


def test_other_errors():
    with pytest.raises(UnsupportedModelError, match="no continuous latent sites"):
        LogDensity(lambda: None)
    density = LogDensity(no_density("none"))
    with pytest.raises(DimensionError, match=r"expected shape \(batch, 1\), got \(1,\)"):
        density.log_prob(torch.zeros(1))


def test_a_matrix_without_a_cholesky_factor_is_no_density():
    """One bad point of a batch: torch raises for all of them, but only that one has the density zero."""

    def model():
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        one = torch.ones_like(rho)
        kernel = torch.stack([torch.stack([one, rho], -1), torch.stack([rho, one], -1)], -2)
        pyro.factor("f", torch.linalg.cholesky(kernel)[..., 1, 1].log())

    density = LogDensity(model)
    u = torch.tensor([[0.1], [2.0], [-0.5]])
    value, score = density.value_and_score(u)
    expected = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + 0.5 * torch.log1p(-(u[:, 0] ** 2))
    torch.testing.assert_close(value[[0, 2]], expected[[0, 2]])
    assert value[1] == -math.inf and score[[0, 2]].isfinite().all()
