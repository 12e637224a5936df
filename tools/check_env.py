"""Checks that this environment is what its tests claim: the fronts installed, and that none loads the other framework.

Usage: python tools/check_env.py FRONT [FRONT]   (pyro, numpyro, or both)
"""

import importlib.util
import subprocess
import sys

FRAMEWORKS = {"pyro": ("torch", "pyro"), "numpyro": ("jax", "jaxlib", "numpyro", "optax")}


def loaded_by(module: str) -> set[str]:
    """Top-level names in sys.modules after `import module` in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"check_env: `import {module}` failed\n{run.stderr}")
    return set(run.stdout.split())


def main(fronts: list[str]) -> None:
    if not fronts or not set(fronts) <= set(FRAMEWORKS):
        sys.exit(__doc__)
    for front, packages in FRAMEWORKS.items():
        for package in packages:
            if (importlib.util.find_spec(package) is not None) != (front in fronts):
                sys.exit(f"check_env: {package} should be {'present' if front in fronts else 'absent'} here")
    if found := loaded_by("flowppl") & {name for names in FRAMEWORKS.values() for name in names}:
        sys.exit(f"check_env: `import flowppl` loads {', '.join(sorted(found))}")
    for front in fronts:
        others = {name for other, names in FRAMEWORKS.items() if other != front for name in names}
        if found := loaded_by(f"flowppl.{front}") & others:
            sys.exit(f"check_env: `import flowppl.{front}` loads {', '.join(sorted(found))}")
    print(f"check_env: Python {sys.version.split()[0]}, {' and '.join(fronts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
