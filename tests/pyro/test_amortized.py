"""AmortizedFlow in Pyro: gradients, minibatches, unseen data, particles, many kinds of sites, and what it refuses."""

import copy
import itertools
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn
from torch.distributions import biject_to, constraints

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, UnsupportedModelError
from flowppl.flows import files
from flowppl.pyro import AmortizedFlow, load_flow, save_flow

AFFINE = flows.affine(hidden=(8,))


def model(y, batch_size=None, subsample=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y), subsample_size=batch_size, subsample=subsample):
        batch = pyro.subsample(y, event_dim=1)
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("obs", dist.Normal(theta[..., None], 1.0).to_event(1), obs=batch)


def rich(y, batch_size=None):
    """Several local sites of different supports and shapes in a plate at dim -2, a plate of globals, a latent on its own."""
    pyro.sample("alone", dist.Gamma(2.0, 1.0))
    kinds = pyro.plate("kinds", 2, dim=-1)
    with kinds:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y), subsample_size=batch_size, dim=-2):
        batch = pyro.subsample(y, event_dim=0)
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        r = pyro.sample("r", dist.Uniform(0.0, 2.0))
        v = pyro.sample("v", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        with kinds:
            pyro.sample("obs", dist.Normal(r + p[..., 0] + v[..., 0], scale), obs=batch)


def features(y, batch_size=None, subsample=None):
    return y


def data(n, k=3, seed=0):
    rng = np.random.default_rng(seed)
    y = 1.0 + rng.standard_normal((n, 1)) + rng.standard_normal((n, k))
    return torch.as_tensor(y, dtype=torch.get_default_dtype())


def small_guide(target=model, read=features, **options):
    options = {"flow": AFFINE, "global_flow": AFFINE, "hidden": (8,), "embedding": 4, **options}
    return AmortizedFlow(target, read, "groups", **options)


def shapes(draws):
    return {name: tuple(value.shape) for name, value in draws.items()}


def exact(y, prior_of=None):
    """Mean and sd of each theta, and those of mu from the data `prior_of`."""
    prior_of = np.asarray(y if prior_of is None else prior_of)
    y, k = np.asarray(y), y.shape[1]
    precision = 1 / 9 + len(prior_of) / (1 + 1 / k)
    mu = prior_of.mean(1).sum() / (1 + 1 / k) / precision
    w = k / (k + 1)
    return w * y.mean(1) + (1 - w) * mu, np.sqrt(1 / (k + 1) + (1 - w) ** 2 / precision), mu, precision**-0.5


def test_a_conjugate_hierarchy_from_minibatches():
    y, guide, steps = data(60), small_guide(gradient="path", embedding=8), 500
    optimizer = pyro.optim.ClippedAdam({"lr": 5e-2, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(steps):
        svi.step(y, batch_size=20)
    for here in (y, data(60, seed=1)):  # unseen ones too
        draws = guide.sample_posterior(torch.Generator().manual_seed(0), here, sample_shape=(4000,))
        mean, sd, mu, mu_sd = exact(here, y)
        # The mean over groups of the absolute Monte Carlo error is 0.013 sds; training leaves about 0.02 more.
        theta = draws["theta"].numpy()
        assert np.abs((theta.mean(0) - mean) / sd).mean() < 0.1
        np.testing.assert_allclose((theta.std(0) / sd).mean(), 1.0, atol=0.05)
        assert abs(draws["mu"].mean() - mu) < 0.5 * mu_sd


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_gradients_agree_with_finite_differences(gradient, scramble, float64):
    """Of the ELBO with fixed noise; in path mode with log q's parameters held where they are."""
    y, guide = data(6), small_guide(gradient=gradient)
    guide.setup(y)
    scramble(guide.parameters())
    frozen = copy.deepcopy(guide)

    @torch.no_grad()
    def by_value():
        pyro.set_rng_seed(1)
        drawn = poutine.trace(guide).get_trace(y)
        values = [drawn.nodes[f"_{guide._pyro_name}_{part}"]["value"] for part in ("global", "local")]
        log_p = poutine.trace(poutine.replay(model, drawn)).get_trace(y).log_prob_sum()
        q = frozen if gradient == "path" else guide
        given = dict(zip((f"_{q._pyro_name}_{part}" for part in ("global", "local")), values, strict=True))
        return poutine.trace(poutine.condition(q, given)).get_trace(y).log_prob_sum() - log_p

    def slope(parameters, direction, step=1e-5):
        ends = []
        for sign in (1, -2, 1):  # ahead, back, and where it was
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(sign * step * d)
            ends.append(by_value())
        return (ends[0] - ends[1]) / (2 * step)

    pyro.set_rng_seed(1)
    Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, y).backward()
    named = dict(guide.named_parameters())
    for part in ("local_parameters.params/bijection/net", "global_parameters"):
        parameters = [p for name, p in named.items() if name.startswith(part)]
        direction = [torch.randn_like(p) for p in parameters]
        product = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
        assert abs(product) > 1e-2
        torch.testing.assert_close(product, slope(parameters, direction), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_the_path_gradient_vanishes_where_the_guide_is_the_posterior(gradient, scramble, float64):
    """Draw by draw, of the encoder and of the flow of globals too, whose values the context depends on."""
    posterior = None

    def target(y, batch_size=None):
        normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        g = pyro.sample("g", posterior._of_global() if posterior else normal)
        with pyro.plate("groups", len(y), subsample_size=batch_size):
            rows = pyro.subsample(y, event_dim=1)
            pyro.sample("theta", posterior._of_local(rows, g) if posterior else normal)

    y = data(6)
    guide = small_guide(target, flow=flows.nsf(layers=2, hidden=(8,)), gradient=gradient).setup(y)
    scramble(guide.parameters())
    posterior = copy.deepcopy(guide).requires_grad_(False)
    Trace_ELBO(max_plate_nesting=1).differentiable_loss(target, guide, y, 3).backward()
    largest = max(p.grad.abs().max() for p in guide.parameters())
    assert largest < 1e-10 if gradient == "path" else largest > 1e-2


def test_minibatches_add_up(scramble, float64):
    """The mean ELBO over all minibatches is the one of all data, at given values of the guide's latents."""
    y, guide = data(4), small_guide()
    guide.setup(y)
    scramble(guide.parameters())
    u, g = torch.randn(4, 1), torch.ones(1)

    @torch.no_grad()
    def elbo(indices):
        own = {f"_{guide._pyro_name}_global": g, f"_{guide._pyro_name}_local": u[indices]}
        trace = poutine.trace(poutine.condition(guide, own)).get_trace(y, subsample=indices)
        log_p = poutine.trace(poutine.replay(model, trace)).get_trace(y, subsample=indices).log_prob_sum()
        return float(log_p - trace.log_prob_sum())

    batches = [elbo(torch.tensor(pair)) for pair in itertools.combinations(range(4), 2)]
    np.testing.assert_allclose(np.mean(batches), elbo(torch.arange(4)), rtol=1e-10)
    assert np.std(batches) > 0.1


SUPPORTS = {
    "alone": constraints.positive,
    "scale": constraints.positive,
    "p": constraints.simplex,
    "r": constraints.interval(0.0, 2.0),
    "v": constraints.independent(constraints.positive, 1),
}


def test_many_kinds_of_sites(scramble, float64):
    y, guide = data(6, 2), small_guide(rich, global_flow=flows.realnvp(layers=1, hidden=(4,)))
    guide.setup(y, 3)
    scramble(guide.parameters())
    trace = poutine.trace(guide).get_trace(y, 3)
    for name, support in SUPPORTS.items():
        site, bijection = trace.nodes[name], biject_to(support)
        assert site["scale"] == (1.0 if name in ("alone", "scale") else 2.0)
        log_det = bijection.log_abs_det_jacobian(bijection.inv(site["value"]), site["value"])
        torch.testing.assert_close(site["fn"].log_prob(site["value"]).sum(), -log_det.sum(), rtol=1e-8, atol=0.0)
    local = {"p": (3,), "r": (), "v": (2,)}
    for shape in ((), (3, 2)):
        draws = guide.sample_posterior(None, y, sample_shape=shape)
        expected = {name: (*shape, 6, 1, *event) for name, event in local.items()}
        assert shapes(draws) == {"alone": shape, "scale": (*shape, 2), **expected}
        assert all(support.check(draws[name]).all() for name, support in SUPPORTS.items())


@pytest.mark.parametrize(("target", "y"), [(model, data(6)), (rich, data(6, 2))])
@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_vectorised_particles(target, y, gradient):
    """Both ways to draw particles estimate one number; six standard errors of a difference apart is a failure."""
    guide, n = small_guide(target, gradient=gradient).setup(y), 200
    one = Trace_ELBO(max_plate_nesting=2)
    losses = np.array([one.loss(target, guide, y) for _ in range(n)])
    many = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=2)
    error = losses.std() * np.sqrt(2 / n)
    assert abs(many.loss(target, guide, y) - losses.mean()) < 6 * error
    many.loss_and_grads(target, guide, y, 3)
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_without_global_latents_and_with_an_encoder_of_ones_own(gradient):
    def local_only(y, batch_size=None):
        with pyro.plate("groups", len(y), subsample_size=batch_size):
            pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    guide, y, before = small_guide(local_only, encoder=encoder, gradient=gradient), data(5), encoder[0].weight.clone()
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
    svi = SVI(local_only, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    for _ in range(3):
        svi.step(y, batch_size=2)
    assert (encoder[0].weight != before).any()
    assert shapes(guide.sample_posterior(None, y, sample_shape=(3,))) == {"theta": (3, 5, 2)}
    assert "encoder.0.weight" in guide.state_dict()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_other_data(parallel):
    guide = small_guide().setup(data(6), batch_size=2)
    drawn = Predictive(model, guide=guide, num_samples=5, parallel=parallel)(data(9))
    assert drawn["obs"].shape == (5, 9, 3) and drawn["theta"].shape == (5, 9)


def test_copies_state_and_pickles(scramble):
    y, guide = data(6), small_guide().setup(data(6), batch_size=2)
    scramble(guide.parameters())
    other = small_guide().setup(y)
    other.load_state_dict(guide.state_dict())
    draw = lambda guide, **kw: guide.sample_posterior(torch.Generator().manual_seed(0), y, **kw)["theta"]
    expected = draw(guide)
    for same in (other, copy.deepcopy(guide)):
        torch.testing.assert_close(draw(same, batch_size=3), expected)  # how much the model asks for does not matter
    thawed = pickle.loads(pickle.dumps(guide))
    torch.testing.assert_close(list(thawed.parameters()), list(guide.parameters()))
    with pytest.raises(RuntimeError, match="comes back without its model"):
        draw(thawed)


def in_two_plates(y):
    with pyro.plate("kinds", 3, dim=-2), pyro.plate("groups", len(y), dim=-1):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def in_another(y):
    with pyro.plate("others", 10, subsample_size=3):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def discrete(y):
    with pyro.plate("groups", len(y)):
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def bounded_by_the_element(y):
    with pyro.plate("groups", len(y)):
        pyro.sample("theta", dist.Uniform(0.0, 1.0 + torch.arange(len(y))))


def bounded_by_a_global(y):
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        pyro.sample("theta", dist.Uniform(0.0, top))


REFUSED = [
    (lambda y: pyro.sample("theta", dist.Normal(0.0, 1.0)), "no latent of the model is in a plate 'groups'"),
    (in_two_plates, "'theta' is in plate 'groups' and in plate 'kinds' too"),
    (in_another, "'z' is in plate 'others', which subsamples 3 of 10"),
    (discrete, "'k' is discrete"),
    (bounded_by_the_element, "support of site 'theta' differs between the elements"),
    (bounded_by_a_global, "support of site 'theta' depends on other latents"),
]


@pytest.mark.parametrize(("target", "message"), REFUSED)
def test_models_that_it_cannot_cover(target, message):
    guide = small_guide(target)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=message):
            guide(data(4))


@pytest.mark.parametrize("read", [lambda y: y[:, 0], lambda y: y[:-1], lambda y: y[:, :, None]])
def test_features_of_another_shape(read):
    with pytest.raises(DimensionError, match="features: expected an array of shape"):
        small_guide(read=read)(data(4))


def test_options_are_checked():
    with pytest.raises(ValueError, match="init_scale"):
        small_guide(init_scale=0.0)
    with pytest.raises(ValueError, match="gradient"):
        small_guide(gradient="score")


def rich_features(y, batch_size=None):
    return y


@pytest.mark.parametrize(
    ("target", "read"), [(model, features), (rich, rich_features)], ids=["global and local", "many sites"]
)
def test_a_file_comes_back(target, read, scramble, tmp_path):
    y, path = data(6, 2), tmp_path / "q.flow"
    guide = small_guide(target, read, flow=flows.realnvp(layers=2, hidden=(4,))).setup(y)
    scramble(guide.parameters())
    guide.save(path)
    again = AmortizedFlow.load(path, target, read, y[:3])  # other data are fine
    draws = [g.sample_posterior(torch.Generator().manual_seed(0), y, sample_shape=(3,)) for g in (guide, again)]
    assert draws[0].keys() == draws[1].keys() and all(torch.equal(draws[0][k], draws[1][k]) for k in draws[0])
    assert all(p.requires_grad for p in again.parameters())


def test_files_that_do_not_fit(tmp_path):
    y, path = data(6), tmp_path / "q.flow"
    small_guide().setup(y).save(path)

    def renamed(y):
        mu = pyro.sample("nu", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.Normal(mu, 1.0))

    def local_alone(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    def elsewhere(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("theta", dist.Normal(mu, 1.0))

    def turning(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.VonMises(mu, 1.0))

    for target, message in [
        (renamed, r"global sites are \[\['mu', 1\]\], those of the model \[\['nu', 1\]\]"),
        (local_alone, r"global sites are \[\['mu', 1\]\], those of the model \[\]"),
        (elsewhere, "no latent of the model is in a plate 'groups'"),
        (rich, "does not fit the model"),
    ]:
        with pytest.raises(FlowFileError, match=message):
            AmortizedFlow.load(path, target, features, y[:, :2] if target is rich else y)
    with pytest.raises(FlowFileError, match="features are 3, those of the model 2"):
        AmortizedFlow.load(path, model, lambda y: y[:, :2], y)
    with pytest.raises(FlowFileError, match="of kind 'AmortizedFlow'"):
        load_flow(path)
    own = small_guide(encoder=nn.Linear(4, 4)).setup(y)
    with pytest.raises(FlowFileError, match=r"no encoder of your own.*guide\.state_dict\(\)"):
        own.save(path)
    content = path.read_bytes()
    for end in (len(content) // 3, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(FlowFileError, match="cannot be read"):
            AmortizedFlow.load(path, model, features, y)
    turned = small_guide(turning, flow=flows.nsf(layers=1, hidden=(4,), bins=3)).setup(y)
    turned.save(path)
    AmortizedFlow.load(path, turning, features, y)
    as_in_numpyro = {**turned._description, "angles": [["theta", "boxed"]]}
    files.write_parts(path, "AmortizedFlow", turned._flows, turned._arrays(), as_in_numpyro)
    with pytest.raises(FlowFileError, match=r"angles are .*boxed.*, those of the model .*turns"):
        AmortizedFlow.load(path, turning, features, y)
    alone = flows.affine()(1)
    save_flow(path, alone, alone.init(torch.Generator()))
    with pytest.raises(FlowFileError, match="is of a flow and not of kind 'AmortizedFlow'"):
        AmortizedFlow.load(path, model, features, y)
    files.write_parts(path, "AmortizedFlow", {"local": alone}, {"local": alone.init(torch.Generator())}, {})
    with pytest.raises(FlowFileError, match="expected one with an encoder"):
        AmortizedFlow.load(path, model, features, y)
    files.write_parts(path, "AmortizedFlow", {"global": alone}, {"global": alone.init(torch.Generator())}, {})
    with pytest.raises(FlowFileError, match="has not the parts"):
        AmortizedFlow.load(path, model, features, y)
