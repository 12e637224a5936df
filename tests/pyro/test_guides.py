"""AutoFlow in everything that Pyro does with its own guides."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam

from flowppl import flows
from flowppl.bijections import Chain, LULinear
from flowppl.errors import DimensionError, NonFiniteError, UnknownFlowError, UnsupportedModelError
from flowppl.pyro import AutoFlow, FlowDistribution, LogDensity

pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites configured for enumeration")
SMALL = flows.realnvp(layers=1, hidden=(4,))
ADAM = pyro.optim.Adam({"lr": 0.01})
DATA = torch.tensor([28.0, 8.0, -3.0, 7.0])


def schools(y):
    """Sites out of the order of their names, one of them in a plate."""
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def gaussian(y=None):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([1.0, -2.0]))


# Setting up


def test_setup_creates_parameters_before_the_first_step(scramble):
    guide = AutoFlow(schools, SMALL)
    assert not list(guide.parameters())
    assert guide.setup(DATA) is guide and len(list(guide.parameters())) > 0
    scramble(guide.parameters())
    other = AutoFlow(schools, SMALL).setup(DATA)
    other.load_state_dict(guide.state_dict())
    values = guide.sample_posterior(sample_shape=(3,))
    assert torch.equal(guide.log_prob(values), other.log_prob(values))


def test_torch_optimizer_trains_what_setup_made():
    guide = AutoFlow(gaussian, "affine").setup()
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True)(gaussian, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert torch.allclose(guide.median()["x"], torch.tensor([0.5, -1.0]), atol=0.25)


def test_start_is_the_given_one():
    start = {"tau": torch.tensor(3.0), "mu": torch.tensor(-1.0), "theta": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    guide = AutoFlow(schools, SMALL, init_loc_fn=init_to_value(values=start), init_scale=1e-4).setup(DATA)
    for name, value in guide.median().items():
        assert torch.allclose(value, start[name], atol=1e-3)
    draws = torch.cat([guide.get_posterior().sample((4000,))])
    assert torch.allclose(draws.std(0), torch.full((6,), 1e-4), rtol=0.1)


def test_coordinates_are_sorted_by_name_and_sites_keep_the_models_order():
    guide = AutoFlow(schools, SMALL).setup(DATA)
    latent = torch.arange(6.0)
    values = {site["name"]: u for site, u in guide._unpack_latent(latent)}
    assert list(values) == ["tau", "mu", "theta"]
    assert values["mu"] == 0.0 and values["tau"] == 1.0 and values["theta"].tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("flow", "added"), [("affine", 0), ("nsf", 0), (flows.Flow(flows.nsf()(6).bijection.bijections[0]), 1)]
)
def test_the_flow_ends_with_an_affine_layer(flow, added):
    guide = AutoFlow(schools, flow).setup(DATA)
    bijection = guide._flow.bijection
    assert isinstance(bijection.bijections[-1] if isinstance(bijection, Chain) else bijection, LULinear)
    if added:
        assert bijection.bijections[0] == flow.bijection


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model(dtype, default):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=dtype), 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=dtype), scale).to_event(1))

    torch.set_default_dtype(default)
    guide = AutoFlow(model, SMALL).setup()
    assert {p.dtype for p in guide.parameters()} == {dtype}
    values = {**guide(), **guide.median(), **guide.sample_posterior()}
    assert {v.dtype for v in values.values()} == {dtype}
    assert math.isfinite(SVI(model, guide, ADAM, Trace_ELBO()).step())
    assert guide.to(torch.float64).sample_posterior()["x"].dtype == dtype  # parameters move, sites keep their dtype


def test_one_latent():
    guide = AutoFlow(lambda: pyro.sample("x", dist.Normal(3.0, 2.0)), flows.nsf(layers=2), gradient="path").setup()
    svi = SVI(guide.model, guide, ADAM, Trace_ELBO(num_particles=4, vectorize_particles=True))
    assert math.isfinite(svi.step())
    assert guide.sample_posterior(sample_shape=(7,))["x"].shape == (7,)


def test_two_guides_do_not_share_parameters(scramble):
    first, second = AutoFlow(gaussian, SMALL), AutoFlow(gaussian, SMALL)
    first()
    second()
    before = [p.detach().clone() for p in first.parameters()]
    scramble(second.parameters())
    first()
    assert all(map(torch.equal, before, first.parameters()))
    names = list(pyro.get_param_store().keys())
    assert len(names) == len(list(first.parameters())) + len(list(second.parameters()))


def test_loaded_param_store_reaches_the_guide(scramble, tmp_path):
    guide = AutoFlow(gaussian, SMALL).setup()
    guide()
    scramble(guide.parameters())
    expected = guide.median()["x"]
    pyro.get_param_store().save(tmp_path / "store")
    scramble(guide.parameters())
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    guide()
    assert torch.equal(guide.median()["x"], expected)


# Losses, particles, plates


@pytest.mark.parametrize("gradient", ["reparam", "path"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("vectorized", [False, True])
def test_losses(elbo, gradient, vectorized):
    guide = AutoFlow(schools, SMALL, gradient=gradient)
    loss = elbo(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    assert math.isfinite(SVI(schools, guide, ADAM, loss).step(DATA))


def test_many_particles_have_the_mean_of_single_ones():
    guide = AutoFlow(schools, SMALL, gradient="path").setup(DATA)
    single = torch.tensor([Trace_ELBO().loss(schools, guide, DATA) for _ in range(150)])
    many = Trace_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=1).loss(schools, guide, DATA)
    assert abs(float(single.mean()) - many) < 4.0 * float(single.std()) * math.sqrt(1 / 150 + 1 / 5000)


def test_mean_field_loss_finds_the_models_order():
    with pyro.validation_enabled(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceMeanField_ELBO().loss(schools, AutoFlow(schools, SMALL), DATA)


def test_nested_plates_and_particles():
    def model():
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert a.shape[-3:] == (3, 1, 2)
            with pyro.plate("inner", 4, dim=-1):
                b = pyro.sample("b", dist.LogNormal(a.sum(-1), 1.0))
                assert b.shape[-2:] == (3, 4)

    guide = AutoFlow(model, SMALL)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(SVI(model, guide, ADAM, elbo).step())
    shapes = {name: tuple(v.shape) for name, v in guide.sample_posterior(sample_shape=(6,)).items()}
    assert shapes == {"a": (6, 3, 1, 2), "b": (6, 3, 4)}


# The posterior


def test_log_prob_is_that_of_the_guide_program(scramble, float64):
    guide = AutoFlow(schools, SMALL).setup(DATA)
    scramble(guide.parameters())
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(DATA)
        values = {name: trace.nodes[name]["value"] for name in ("tau", "mu", "theta")}
        assert torch.allclose(guide.log_prob(values), trace.log_prob_sum())
    batch = guide.sample_posterior(sample_shape=(2, 3))
    one = {name: v[1, 2] for name, v in batch.items()}
    assert guide.log_prob(batch).shape == (2, 3) and torch.allclose(guide.log_prob(batch)[1, 2], guide.log_prob(one))


def test_log_prob_wants_every_site_in_its_shape():
    guide = AutoFlow(schools, SMALL).setup(DATA)
    values = guide.sample_posterior()
    with pytest.raises(DimensionError, match=r"values\['mu'\]: expected shape \(\*batch, \), got none"):
        guide.log_prob({k: v for k, v in values.items() if k != "mu"})
    with pytest.raises(DimensionError, match=r"values\['theta'\]: expected shape \(\*batch, 4\), got shape \(3,\)"):
        guide.log_prob({**values, "theta": torch.zeros(3)})


def test_sample_posterior_takes_a_generator():
    guide = AutoFlow(schools, SMALL).setup(DATA)
    state = torch.get_rng_state()
    first, second = (guide.sample_posterior(torch.Generator().manual_seed(3), (5,)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], second[k]) and not first[k].requires_grad for k in first)
    assert first["theta"].shape == (5, 4)


def test_quantiles_of_a_known_posterior():
    guide = AutoFlow(
        gaussian, "affine", init_loc_fn=init_to_value(values={"x": torch.tensor([1.0, 2.0])}), init_scale=0.5
    ).setup()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])["x"]
    exact = dist.Normal(torch.tensor([1.0, 2.0]), 0.5).icdf(torch.tensor([[0.1], [0.5], [0.9]]))
    assert torch.allclose(quantiles, exact, atol=5 * 0.5 * 0.017)  # 5 standard errors of a quantile of 10 000 draws
    assert torch.equal(guide.median()["x"], quantiles[1]) and torch.equal(guide.quantiles(0.5)["x"], quantiles[1])
    assert torch.equal(guide.quantiles(torch.tensor([0.1, 0.9]))["x"], quantiles[::2])
    assert AutoFlow(schools, SMALL).median(DATA)["tau"] > 0  # sets itself up


def test_predictive():
    guide = AutoFlow(schools, SMALL).setup(DATA)
    for parallel in (False, True):
        draws = Predictive(schools, guide=guide, num_samples=6, parallel=parallel)(DATA)
        assert draws["theta"].shape == (6, 4) and draws["y"].shape == (6, 4) and draws["tau"].numel() == 6
        assert Predictive(guide, num_samples=6, parallel=parallel)(DATA)["theta"].shape == (6, 4)


def test_neutra_reparam(scramble, float64):
    """The density in the warped space is the pulled-back posterior, and NUTS finds its way in it."""
    guide = AutoFlow(schools, SMALL).setup(DATA)
    guide.requires_grad_(False)
    scramble(guide.parameters(), 0.1)
    neutra = NeuTraReparam(guide)
    trace = poutine.trace(neutra.reparam(schools)).get_trace(DATA)
    z = trace.nodes["tau_shared_latent"]["value"]
    transform = guide.get_transform()
    u = transform(z)
    expected = LogDensity(schools, (DATA,)).log_prob(u[None])[0] + transform.log_abs_det_jacobian(z, u)
    assert torch.allclose(trace.log_prob_sum(), expected)
    mcmc = MCMC(NUTS(neutra.reparam(schools), max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(DATA)
    (latent,) = mcmc.get_samples().values()
    draws = neutra.transform_sample(latent.unsqueeze(-2))  # in front of the model's plates
    assert draws["theta"].shape == (5, 4) and (draws["tau"] > 0).all()


def test_neutra_refuses_what_pyro_would_count_twice():
    """Pyro's own guides have a silently wrong density there."""

    def model():
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))

    guide = AutoFlow(model, SMALL).setup()
    with pytest.raises(UnsupportedModelError, match=r"'z' is the model's first latent and in a plate.*to_event"):
        guide.get_transform()
    with pytest.raises(ValueError, match="NeuTraReparam only supports"):
        NeuTraReparam(guide).reparam(model)()
    assert guide.get_posterior().transforms[0](torch.zeros(4)).shape == (4,)


def test_get_transform_maps_the_base_to_the_posterior(scramble, float64):
    guide = AutoFlow(schools, SMALL).setup(DATA)
    scramble(guide.parameters())
    z = guide.get_base_dist().sample((5,))
    transform = guide.get_transform()
    x = transform(z)
    log_prob = guide.get_base_dist().log_prob(z) - transform.log_abs_det_jacobian(z, x)
    assert torch.allclose(guide.get_posterior().log_prob(x), log_prob)
    assert isinstance(guide.get_posterior(), FlowDistribution)


# Discrete sites, other guides


def mixture(y):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[..., 0] + k * (loc[..., 1] - loc[..., 0]), 1.0), obs=y)


def test_enumerated_sites_are_left_to_the_loss():
    model = config_enumerate(mixture)
    guide = AutoFlow(model, SMALL, gradient="path").setup(DATA)
    assert set(guide.median()) == {"loc", "weights"}
    for elbo in (TraceEnum_ELBO(max_plate_nesting=1), TraceEnum_ELBO(5, max_plate_nesting=1, vectorize_particles=True)):
        assert math.isfinite(SVI(model, guide, ADAM, elbo).step(DATA))
    assert guide.precondition(None, DATA) is guide


def test_guide_list():
    guide = AutoGuideList(schools)
    guide.append(AutoFlow(poutine.block(schools, expose=["mu", "tau"]), SMALL, gradient="path"))
    guide.append(AutoNormal(poutine.block(schools, expose=["theta"])))
    other = AutoGuideList(schools)
    other.append(AutoFlow(poutine.block(schools, expose=["mu", "tau"]), SMALL))
    other.append(AutoNormal(poutine.block(schools, expose=["theta"])))
    for g in (guide, other):
        assert math.isfinite(SVI(schools, g, ADAM, Trace_ELBO()).step(DATA))
    assert set(guide.median(DATA)) == {"mu", "tau", "theta"}
    assert [tuple(v.shape) for v in guide.quantiles([0.2, 0.8], DATA).values()] == [(2,), (2,), (2, 4)]
    assert set(map(id, guide[0].parameters())).isdisjoint(map(id, other[0].parameters()))


def test_model_that_is_a_module():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1))

    model = Model()
    guide = AutoFlow(model, SMALL).setup()
    assert not set(map(id, model.parameters())) & set(map(id, guide.parameters()))
    assert math.isfinite(SVI(model, guide, ADAM, Trace_ELBO()).step())
    copy.deepcopy(guide)


# Copies and pickles


def test_pickle_leaves_the_live_guide_alone(scramble):
    guide = AutoFlow(schools, SMALL, gradient="path").setup(DATA)
    scramble(guide.parameters())
    guide(DATA)

    def saved(guide):
        buffer = io.BytesIO()
        torch.save(guide, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    for again in (lambda g: pickle.loads(pickle.dumps(g)), saved):
        other, values = again(guide), guide.sample_posterior(sample_shape=(3,))
        assert torch.equal(other.log_prob(values), guide.log_prob(values))
        other(DATA)  # a name of its own: the store of the live guide must not overwrite it
        before = [p.detach().clone() for p in other.parameters()]
        scramble(guide.parameters())
        other(DATA)
        assert all(map(torch.equal, before, other.parameters()))
        assert math.isfinite(SVI(schools, other, ADAM, Trace_ELBO()).step(DATA))
        with pytest.raises(RuntimeError, match="without its model: use save and load"):
            other.precondition(None, DATA)
    assert callable(guide.model) and guide.precondition(None, DATA) is guide


def test_deep_copy_is_independent_and_whole(scramble):
    guide = AutoFlow(schools, SMALL).setup(DATA)
    guide(DATA)
    other = copy.deepcopy(guide)
    scramble(other.parameters())
    other(DATA)
    guide(DATA)
    values = guide.sample_posterior(sample_shape=(3,))
    assert not torch.allclose(other.log_prob(values), guide.log_prob(values))
    assert other.precondition(None, DATA) is other and callable(guide.model)
    assert copy.deepcopy(AutoFlow(schools, SMALL)).setup(DATA).latent_dim == 6  # before setup, too


# Preconditioning


def test_precondition_finds_a_gaussian_posterior_exactly(float64):
    design = torch.tensor([[1.0, 1000.0], [1.0, 1001.0], [1.0, 1003.0]])

    def regression(y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ design.T if beta.dim() > 1 else design @ beta, 0.5).to_event(1), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0])
    precision = design.T @ design / 0.25 + 0.01 * torch.eye(2)
    loc = torch.linalg.solve(precision, design.T @ y / 0.25)
    covariance = torch.linalg.inv(precision)
    guide = AutoFlow(regression, "affine").setup(y)
    held = list(guide.parameters())
    guide.precondition(torch.Generator().manual_seed(0), y)
    assert all(a is b for a, b in zip(held, guide.parameters(), strict=True))  # in place: optimizers hold on to them
    transform = guide.get_transform()
    scale = torch.stack([transform(e) - transform(torch.zeros(2)) for e in torch.eye(2)], -1)
    assert torch.allclose(scale @ scale.T, covariance, rtol=1e-4)
    error = transform(torch.zeros(2)) - loc
    assert error @ precision @ error < 1e-6


def test_precondition_evaluates_a_model_in_float64():
    """The years' posterior has a correlation of 1 - 3e-6: float32 would leave a tenth of a nat of noise on every evaluation."""

    def trend(design, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), torch.tensor([1e6, 1e3])).to_event(1))
        pyro.sample("y", dist.Normal(design @ beta, 0.01).to_event(1), obs=y)

    year = torch.arange(1990.0, 2010.0)
    y = 0.25 * (year - 2000.0)
    design = torch.stack([torch.ones(20), year], -1)
    guide = AutoFlow(trend, "affine").setup(design, y)
    assert guide.preconditioned is None
    found = guide.precondition(None, design, y).preconditioned
    assert guide.get_posterior().sample().dtype == torch.get_default_dtype() == torch.float32
    precision = (design.double().T @ design.double() / 0.01**2).numpy() + np.diag([1e-12, 1e-6])
    loc = np.linalg.solve(precision, (design.double().T @ y.double() / 0.01**2).numpy())
    whitened = np.linalg.cholesky(precision).T @ found.scale_tril
    np.testing.assert_allclose(whitened @ whitened.T, np.eye(2), atol=1e-3)
    assert (found.loc - loc) @ precision @ (found.loc - loc) < 1e-4
    rest = (y.double() - design.double() @ torch.as_tensor(loc)).numpy()
    at_mode = -0.5 * (rest @ rest / 0.01**2 + ((loc / [1e6, 1e3]) ** 2).sum()) - np.log(0.01**20 * 1e9)
    evidence = at_mode - 0.5 * np.linalg.slogdet(precision)[1] - 10 * np.log(2 * np.pi)
    assert found.elbo == pytest.approx(evidence, abs=1e-3)
    assert found.num_evals < 10_000


def test_precondition_takes_a_model_that_insists_on_float32():
    net = torch.nn.Linear(2, 1)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(z), 0.5).to_event(1), obs=y)

    guide = AutoFlow(model, "affine").precondition(None, torch.ones(1))
    assert math.isfinite(guide.preconditioned.elbo) and torch.get_default_dtype() == torch.float32


def test_precondition_tries_other_starts():
    def model():
        z = pyro.sample("z", dist.Normal(2.0, 0.1))
        pyro.factor("f", torch.where(z < 1.0, -math.inf, 0.0))

    guide = AutoFlow(model, "affine", init_loc_fn=init_to_value(values={"z": torch.tensor(0.0)})).precondition(None)
    np.testing.assert_allclose(guide.preconditioned.loc, 2.0, atol=1e-5)


def test_precondition_lowers_the_loss():
    guide = AutoFlow(schools, SMALL).setup(DATA)
    loss = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    before = loss.loss(schools, guide, DATA)
    guide.precondition(None, DATA)
    assert loss.loss(schools, guide, DATA) < before - 1.0


# Errors


def test_choices_are_checked_at_once():
    with pytest.raises(ValueError, match="gradient must be one of reparam, path, auto, got 'stl'"):
        AutoFlow(schools, gradient="stl")
    with pytest.raises(ValueError, match="init_scale must be positive, got 0"):
        AutoFlow(schools, init_scale=0.0)
    with pytest.raises(UnknownFlowError, match="did you mean 'nsf'"):
        AutoFlow(schools, "nfs")


def test_flow_of_another_dimension():
    guide = AutoFlow(schools, SMALL(5))
    for _ in range(2):  # a failed setup is not half a setup
        with pytest.raises(DimensionError, match=r"expected dim=6.*give a name or a recipe"):
            guide.setup(DATA)


def test_use_before_setup():
    for use in (
        lambda g: g.sample_posterior(),
        lambda g: g.log_prob({}),
        lambda g: g.get_posterior(),
        lambda g: g.get_base_dist(),
        lambda g: g.get_transform(),
        lambda g: g.save("nowhere"),
    ):
        with pytest.raises(RuntimeError, match=r"call guide.setup\(...\) with the model's arguments first"):
            use(AutoFlow(schools))


def test_discrete_site():
    with pytest.raises(UnsupportedModelError, match=r"'k' is discrete.*config_enumerate\(model\).*hide=\['k'\]"):
        AutoFlow(mixture).setup(DATA)
    hidden = AutoFlow(poutine.block(mixture, hide=["k"]), SMALL).setup(DATA)
    assert set(hidden.median()) == {"loc", "weights"}


def test_subsampled_latents():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    with pytest.raises(UnsupportedModelError, match=r"'z' is in plate 'data', which subsamples 2 of 10.*AmortizedFlow"):
        AutoFlow(model).setup(torch.zeros(2))


def test_subsampled_data_without_latents_are_fine():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data[rows])

    assert math.isfinite(SVI(model, AutoFlow(model), ADAM, Trace_ELBO()).step(torch.zeros(10)))


def test_support_that_depends_on_another_latent():
    def model():
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, high))

    with pytest.raises(
        UnsupportedModelError, match=r"support of site 'x' depends on other latents.*sample a standardised variable"
    ):
        AutoFlow(model).setup()


def test_start_where_the_density_is_not_finite():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (x - x.detach()).log())

    with pytest.raises(NonFiniteError, match="choose another init_loc_fn"):
        AutoFlow(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)})).precondition(None)
