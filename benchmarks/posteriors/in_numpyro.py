"""The posteriors in NumPyro; `in_pyro` has the same with the same sites."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


class Autoregression(dist.Distribution):
    """Gaussian series ``x[t] = loc + phi * (x[t-1] - loc) + scale * noise[t]``, begun by ``x[0] = loc + first * noise[0]``."""

    support = dist.constraints.real_vector

    def __init__(self, loc: Array, phi: Array, scale: Array, first: Array, length: int) -> None:
        self.loc, self.phi, self.scale, self.first = loc, phi, scale, first
        super().__init__(event_shape=(length,))

    def push(self, noise: Array) -> Array:
        """The series made by noise of shape ``(*batch, length)``."""

        def step(x: Array, noise: Array) -> tuple[Array, Array]:
            x = self.phi * x + self.scale * noise
            return x, x

        start = self.first * noise[..., 0]
        rest = jax.lax.scan(step, start, jnp.moveaxis(noise[..., 1:], -1, 0))[1]
        return self.loc + jnp.concatenate([start[..., None], jnp.moveaxis(rest, 0, -1)], -1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.push(jax.random.normal(key, (*sample_shape, *self.event_shape)))

    def log_prob(self, value: Array) -> Array:
        x = value - self.loc
        steps = dist.Normal(self.phi * x[..., :-1], self.scale).log_prob(x[..., 1:])
        return dist.Normal(0.0, self.first).log_prob(x[..., 0]) + steps.sum(-1)


def engel(income: Array, food: Array) -> None:
    """Food expenditure on income, in francs."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 100.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(100.0))
    with numpyro.plate("household", len(food)):
        numpyro.sample("food", dist.Normal(alpha + beta * income, sigma), obs=food)


def cars(weight: Array, power: Array, time: Array, mpg: Array) -> None:
    """Miles per gallon on three predictors and all of their products."""
    pairs = [weight * power, weight * time, power * time]
    x = jnp.stack([weight, power, time, *pairs, weight * power * time], -1)
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 100.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("term", 7):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    with numpyro.plate("car", len(mpg)):
        numpyro.sample("mpg", dist.Normal(alpha + x @ beta, sigma), obs=mpg)


def huron(year: Array, level: Array) -> None:
    """A cubic trend."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 1000.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("power", 3):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    trend = alpha + beta[0] * year + beta[1] * year**2 + beta[2] * year**3
    with numpyro.plate("observation", len(level)):
        numpyro.sample("level", dist.Normal(trend, sigma), obs=level)


def longley(x: Array, employed: Array) -> None:
    """Employment on six series that grow together."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 1e6))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1000.0))
    with numpyro.plate("series", 6):
        beta = numpyro.sample("beta", dist.Normal(0.0, 1000.0))
    with numpyro.plate("year", len(employed)):
        numpyro.sample("employed", dist.Normal(alpha + x @ beta, sigma), obs=employed)


def horseshoe(x: Array, y: Array) -> None:
    """Regression with a horseshoe prior (Carvalho, Polson and Scott 2010)."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    with numpyro.plate("feature", 10):
        lam = numpyro.sample("lam", dist.HalfCauchy(1.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, tau * lam))
    with numpyro.plate("patient", len(y)):
        numpyro.sample("y", dist.Normal(alpha + x @ beta, sigma), obs=y)


def sunspots(count: Array) -> None:
    """Autoregression of order two, given the first two years."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 50.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(50.0))
    with numpyro.plate("lag", 2):
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.0))
    mean = alpha + beta[0] * count[1:-1] + beta[1] * count[:-2]
    with numpyro.plate("year", len(count) - 2):
        numpyro.sample("count", dist.Normal(mean, sigma), obs=count[2:])


def volatility(growth: Array) -> None:
    """Stochastic volatility: the log variance ``h`` is a stationary autoregression of order one (Kim et al. 1998)."""
    drift = numpyro.sample("drift", dist.Normal(0.0, 2.0))
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    phi = numpyro.sample("phi", dist.Uniform(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    h = numpyro.sample("h", Autoregression(mu, phi, sigma, sigma / jnp.sqrt(1.0 - phi**2), len(growth)))
    with numpyro.plate("quarter", len(growth)):
        numpyro.sample("growth", dist.Normal(drift, jnp.exp(h / 2.0)), obs=growth)


def coal(time: Array, disasters: Array) -> None:
    """A log rate with a Gaussian process prior of unknown mean, amplitude and length (years)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    amplitude = numpyro.sample("amplitude", dist.HalfNormal(2.0))
    length = numpyro.sample("length", dist.LogNormal(3.0, 1.0))
    distance = (time[:, None] - time) / length
    kernel = jnp.exp(-0.5 * distance**2) + 1e-3 * jnp.eye(len(time), dtype=time.dtype)
    factor = amplitude * jnp.linalg.cholesky(kernel)
    f = numpyro.sample("f", dist.MultivariateNormal(jnp.full(len(time), mu), scale_tril=factor))
    with numpyro.plate("period", len(time)):
        numpyro.sample("disasters", dist.Poisson(jnp.exp(f)), obs=disasters)


def nile(volume: Array) -> None:
    """Local level model: a random walk ``level``, observed with noise (Durbin and Koopman 2012)."""
    noise = numpyro.sample("noise", dist.HalfNormal(200.0))
    drift = numpyro.sample("drift", dist.HalfNormal(200.0))
    level = numpyro.sample("level", Autoregression(1000.0, 1.0, drift, 500.0, len(volume)))
    with numpyro.plate("year", len(volume)):
        numpyro.sample("volume", dist.Normal(level, noise), obs=volume)


def lynx_hare(pelts: Array) -> None:
    """Lotka-Volterra equations for log populations, by Runge-Kutta steps of a quarter of a year; log-normal errors.

    Reference: Carpenter (2018), "Predator-prey population dynamics", Stan case studies.
    """
    alpha = numpyro.sample("alpha", dist.LogNormal(0.0, 0.5))
    beta = numpyro.sample("beta", dist.LogNormal(-3.0, 1.0))
    gamma = numpyro.sample("gamma", dist.LogNormal(0.0, 0.5))
    delta = numpyro.sample("delta", dist.LogNormal(-3.0, 1.0))
    with numpyro.plate("species", 2):
        start = numpyro.sample("start", dist.LogNormal(2.3, 1.0))
        sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0))

    def slope(z: Array) -> Array:
        return jnp.stack([alpha - beta * jnp.exp(z[1]), delta * jnp.exp(z[0]) - gamma])

    def step(z: Array, _: None) -> tuple[Array, Array]:
        k1 = slope(z)
        k2 = slope(z + 0.125 * k1)
        k3 = slope(z + 0.125 * k2)
        k4 = slope(z + 0.25 * k3)
        return z + 0.25 / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4), z

    path = jax.lax.scan(step, jnp.log(start), None, length=4 * (len(pelts) - 1) + 1)[1]
    with numpyro.plate("animal", 2), numpyro.plate("year", len(pelts)):
        numpyro.sample("pelts", dist.LogNormal(path[::4], sigma), obs=pelts)


def mpg(group: Array, displacement: Array, mpg: Array) -> None:
    """An intercept and a slope for each class of car."""
    mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 50.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 10.0))
    tau_a = numpyro.sample("tau_a", dist.HalfCauchy(10.0))
    tau_b = numpyro.sample("tau_b", dist.HalfCauchy(5.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("class", 7):
        a = numpyro.sample("a", dist.Normal(mu_a, tau_a))
        b = numpyro.sample("b", dist.Normal(mu_b, tau_b))
    i = group.astype(int)
    with numpyro.plate("car", len(mpg)):
        numpyro.sample("mpg", dist.Normal(a[i] + b[i] * displacement, sigma), obs=mpg)


def party(x: Array, identification: Array) -> None:
    """Ordered logistic regression of a party identification in seven steps.

    A stable `OrderedLogistic`: Pyro's does not run under `torch.func.vmap`, and both lose the gradient far from the data.
    """
    with numpyro.plate("feature", 4):
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    prior = dist.Normal(0.0, jnp.array([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], x.dtype))
    cuts = numpyro.sample("cuts", dist.TransformedDistribution(prior, dist.transforms.OrderedTransform()))
    below = jax.nn.log_sigmoid(cuts - (x @ beta)[:, None])
    above = jax.nn.log_sigmoid((x @ beta)[:, None] - cuts)
    gap = jnp.log(-jnp.expm1(cuts[:-1] - cuts[1:]))
    logits = jnp.concatenate([below[:, :1], below[:, 1:] + above[:, :-1] + gap, above[:, -1:]], -1)
    with numpyro.plate("person", len(x)):
        numpyro.sample("party", dist.Categorical(logits=logits), obs=identification.astype(int))


def heart(days: Array, age: Array, days_alive: Array, age_alive: Array) -> None:
    """Weibull survival times whose scale depends on age: their logarithm, negated, is Gumbel.

    The second group was alive when last seen.
    """
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    shape = numpyro.sample("shape", dist.HalfNormal(2.0))
    with numpyro.plate("dead", len(days)):
        numpyro.sample("days", dist.Gumbel(-alpha - beta * age, 1.0 / shape), obs=-jnp.log(days))
    numpyro.factor("alive", -jnp.sum(jnp.exp(shape * (jnp.log(days_alive) - alpha - beta * age_alive))))


def seeds(germinated: Array, total: Array, kind: Array, extract: Array) -> None:
    """Logistic regression with an effect of each plate (Breslow and Clayton 1993)."""
    with numpyro.plate("term", 4):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
    mean = beta[0] + beta[1] * kind + beta[2] * extract + beta[3] * kind * extract
    with numpyro.plate("plate", len(total)):
        logit = numpyro.sample("logit", dist.Normal(mean, sigma))
        numpyro.sample("germinated", dist.Binomial(total, logits=logit), obs=germinated)
