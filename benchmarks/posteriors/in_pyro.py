"""The posteriors in Pyro; `in_numpyro` has the same with the same sites."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class Autoregression(dist.TorchDistribution):
    """Gaussian series ``x[t] = loc + phi * (x[t-1] - loc) + scale * noise[t]``, begun by ``x[0] = loc + first * noise[0]``."""

    arg_constraints = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, phi: Tensor, scale: Tensor, first: Tensor, length: int) -> None:
        self.loc, self.phi, self.scale, self.first = loc, phi, scale, first
        super().__init__(event_shape=(length,))

    def push(self, noise: Tensor) -> Tensor:
        """The series made by noise of shape ``(*batch, length)``."""
        x = [self.first * noise[..., 0]]
        for t in range(1, noise.shape[-1]):
            x.append(self.phi * x[-1] + self.scale * noise[..., t])
        return self.loc + torch.stack(x, -1)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.push(
            torch.randn(*sample_shape, *self.event_shape, dtype=self.scale.dtype, device=self.scale.device)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        x = value - self.loc
        steps = dist.Normal(self.phi * x[..., :-1], self.scale).log_prob(x[..., 1:])
        return dist.Normal(torch.zeros_like(self.first), self.first).log_prob(x[..., 0]) + steps.sum(-1)


def engel(income: Tensor, food: Tensor) -> None:
    """Food expenditure on income, in francs."""
    number = food.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 100.0))
    beta = pyro.sample("beta", dist.Normal(number(0.0), 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(100.0)))
    with pyro.plate("household", len(food)):
        pyro.sample("food", dist.Normal(alpha + beta * income, sigma), obs=food)


def cars(weight: Tensor, power: Tensor, time: Tensor, mpg: Tensor) -> None:
    """Miles per gallon on three predictors and all of their products."""
    number = mpg.new_tensor
    pairs = [weight * power, weight * time, power * time]
    x = torch.stack([weight, power, time, *pairs, weight * power * time], -1)
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 100.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(10.0)))
    with pyro.plate("term", 7):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 10.0))
    with pyro.plate("car", len(mpg)):
        pyro.sample("mpg", dist.Normal(alpha + x @ beta, sigma), obs=mpg)


def huron(year: Tensor, level: Tensor) -> None:
    """A cubic trend."""
    number = level.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 1000.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(10.0)))
    with pyro.plate("power", 3):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 10.0))
    trend = alpha + beta[0] * year + beta[1] * year**2 + beta[2] * year**3
    with pyro.plate("observation", len(level)):
        pyro.sample("level", dist.Normal(trend, sigma), obs=level)


def longley(x: Tensor, employed: Tensor) -> None:
    """Employment on six series that grow together."""
    number = x.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 1e6))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(1000.0)))
    with pyro.plate("series", 6):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 1000.0))
    with pyro.plate("year", len(employed)):
        pyro.sample("employed", dist.Normal(alpha + x @ beta, sigma), obs=employed)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """Regression with a horseshoe prior (Carvalho, Polson and Scott 2010)."""
    number = x.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(1.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(number(1.0)))
    with pyro.plate("feature", 10):
        lam = pyro.sample("lam", dist.HalfCauchy(number(1.0)))
        beta = pyro.sample("beta", dist.Normal(number(0.0), tau * lam))
    with pyro.plate("patient", len(y)):
        pyro.sample("y", dist.Normal(alpha + x @ beta, sigma), obs=y)


def sunspots(count: Tensor) -> None:
    """Autoregression of order two, given the first two years."""
    number = count.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 50.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(50.0)))
    with pyro.plate("lag", 2):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 2.0))
    mean = alpha + beta[0] * count[1:-1] + beta[1] * count[:-2]
    with pyro.plate("year", len(count) - 2):
        pyro.sample("count", dist.Normal(mean, sigma), obs=count[2:])


def volatility(growth: Tensor) -> None:
    """Stochastic volatility: the log variance ``h`` is a stationary autoregression of order one (Kim et al. 1998)."""
    number = growth.new_tensor
    drift = pyro.sample("drift", dist.Normal(number(0.0), 2.0))
    mu = pyro.sample("mu", dist.Normal(number(0.0), 3.0))
    phi = pyro.sample("phi", dist.Uniform(number(0.0), number(1.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(1.0)))
    h = pyro.sample("h", Autoregression(mu, phi, sigma, sigma / torch.sqrt(1.0 - phi**2), len(growth)))
    with pyro.plate("quarter", len(growth)):
        pyro.sample("growth", dist.Normal(drift, torch.exp(h / 2.0)), obs=growth)


def coal(time: Tensor, disasters: Tensor) -> None:
    """A log rate with a Gaussian process prior of unknown mean, amplitude and length (years)."""
    number = time.new_tensor
    mu = pyro.sample("mu", dist.Normal(number(0.0), 3.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(number(2.0)))
    length = pyro.sample("length", dist.LogNormal(number(3.0), 1.0))
    distance = (time[:, None] - time) / length
    kernel = torch.exp(-0.5 * distance**2) + 1e-3 * torch.eye(len(time), dtype=time.dtype, device=time.device)
    factor = amplitude * torch.linalg.cholesky(kernel)
    f = pyro.sample("f", dist.MultivariateNormal(mu.expand(len(time)), scale_tril=factor))
    with pyro.plate("period", len(time)):
        pyro.sample("disasters", dist.Poisson(torch.exp(f)), obs=disasters)


def nile(volume: Tensor) -> None:
    """Local level model: a random walk ``level``, observed with noise (Durbin and Koopman 2012)."""
    number = volume.new_tensor
    noise = pyro.sample("noise", dist.HalfNormal(number(200.0)))
    drift = pyro.sample("drift", dist.HalfNormal(number(200.0)))
    level = pyro.sample("level", Autoregression(number(1000.0), number(1.0), drift, number(500.0), len(volume)))
    with pyro.plate("year", len(volume)):
        pyro.sample("volume", dist.Normal(level, noise), obs=volume)


def lynx_hare(pelts: Tensor) -> None:
    """Lotka-Volterra equations for log populations, by Runge-Kutta steps of a quarter of a year; log-normal errors.

    Reference: Carpenter (2018), "Predator-prey population dynamics", Stan case studies.
    """
    number = pelts.new_tensor
    alpha = pyro.sample("alpha", dist.LogNormal(number(0.0), 0.5))
    beta = pyro.sample("beta", dist.LogNormal(number(-3.0), 1.0))
    gamma = pyro.sample("gamma", dist.LogNormal(number(0.0), 0.5))
    delta = pyro.sample("delta", dist.LogNormal(number(-3.0), 1.0))
    with pyro.plate("species", 2):
        start = pyro.sample("start", dist.LogNormal(number(2.3), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(number(-1.0), 1.0))

    def slope(z: Tensor) -> Tensor:
        return torch.stack([alpha - beta * torch.exp(z[1]), delta * torch.exp(z[0]) - gamma])

    path = [torch.log(start)]
    for _ in range(4 * (len(pelts) - 1)):
        z = path[-1]
        k1 = slope(z)
        k2 = slope(z + 0.125 * k1)
        k3 = slope(z + 0.125 * k2)
        k4 = slope(z + 0.25 * k3)
        path.append(z + 0.25 / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4))
    with pyro.plate("animal", 2), pyro.plate("year", len(pelts)):
        pyro.sample("pelts", dist.LogNormal(torch.stack(path[::4]), sigma), obs=pelts)


def mpg(group: Tensor, displacement: Tensor, mpg: Tensor) -> None:
    """An intercept and a slope for each class of car."""
    number = mpg.new_tensor
    mu_a = pyro.sample("mu_a", dist.Normal(number(0.0), 50.0))
    mu_b = pyro.sample("mu_b", dist.Normal(number(0.0), 10.0))
    tau_a = pyro.sample("tau_a", dist.HalfCauchy(number(10.0)))
    tau_b = pyro.sample("tau_b", dist.HalfCauchy(number(5.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(number(10.0)))
    with pyro.plate("class", 7):
        a = pyro.sample("a", dist.Normal(mu_a, tau_a))
        b = pyro.sample("b", dist.Normal(mu_b, tau_b))
    i = group.long()
    with pyro.plate("car", len(mpg)):
        pyro.sample("mpg", dist.Normal(a[i] + b[i] * displacement, sigma), obs=mpg)


def party(x: Tensor, identification: Tensor) -> None:
    """Ordered logistic regression of a party identification in seven steps.

    A stable `OrderedLogistic`: Pyro's does not run under `torch.func.vmap`, and both lose the gradient far from the data.
    """
    number = x.new_tensor
    with pyro.plate("feature", 4):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 1.0))
    prior = dist.Normal(number(0.0), number([5.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    cuts = pyro.sample("cuts", dist.TransformedDistribution(prior, dist.transforms.OrderedTransform()))
    below = torch.nn.functional.logsigmoid(cuts - (x @ beta)[:, None])
    above = torch.nn.functional.logsigmoid((x @ beta)[:, None] - cuts)
    gap = torch.log(-torch.expm1(cuts[:-1] - cuts[1:]))
    logits = torch.cat([below[:, :1], below[:, 1:] + above[:, :-1] + gap, above[:, -1:]], -1)
    with pyro.plate("person", len(x)):
        pyro.sample("party", dist.Categorical(logits=logits), obs=identification.long())


def heart(days: Tensor, age: Tensor, days_alive: Tensor, age_alive: Tensor) -> None:
    """Weibull survival times whose scale depends on age: their logarithm, negated, is Gumbel.

    The second group was alive when last seen.
    """
    number = days.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(number(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(number(0.0), 1.0))
    shape = pyro.sample("shape", dist.HalfNormal(number(2.0)))
    with pyro.plate("dead", len(days)):
        pyro.sample("days", dist.Gumbel(-alpha - beta * age, 1.0 / shape), obs=-torch.log(days))
    pyro.factor("alive", -torch.sum(torch.exp(shape * (torch.log(days_alive) - alpha - beta * age_alive))))


def seeds(germinated: Tensor, total: Tensor, kind: Tensor, extract: Tensor) -> None:
    """Logistic regression with an effect of each plate (Breslow and Clayton 1993)."""
    number = total.new_tensor
    with pyro.plate("term", 4):
        beta = pyro.sample("beta", dist.Normal(number(0.0), 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(number(1.0)))
    mean = beta[0] + beta[1] * kind + beta[2] * extract + beta[3] * kind * extract
    with pyro.plate("plate", len(total)):
        logit = pyro.sample("logit", dist.Normal(mean, sigma))
        pyro.sample("germinated", dist.Binomial(total, logits=logit), obs=germinated)
