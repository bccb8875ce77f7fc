"""What the tests share: a policy small enough to be built in a moment, and observations for it."""

import dataclasses
import os
import shutil
import sys
import tarfile
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import make_envs
from pi_models import CHECKPOINTS, TINY, Policy, Prefixes
from simulators.libero import PACKAGES

os.environ.setdefault("MUJOCO_GL", "egl" if find_library("EGL") else "osmesa")  # before MuJoCo is imported
torch.set_num_threads(1)  # at these sizes a second thread only waits for the first
STATS = {
    "state": {"mean": [0.1, 0.0, -0.2, 0.0], "std": [0.5, 0.4, 0.9, 1.0]},
    "actions": {"mean": [0.05, -0.1, 0.2], "std": [0.6, 0.5, 0.8]},
}
for part in STATS.values():  # of pi0.5; not symmetric about the mean
    part["q01"], part["q99"] = ([m + w * s for m, s in zip(part["mean"], part["std"])] for w in (-2.1, 1.9))

# where every denoise step may be noisy and one decides, and two optimiser steps a pass: the paper's sampling
HYBRID = dict(mdp="hybrid", noisy_last_step=True, noise_level=1.0, update_epochs=4, num_minibatches=2)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not among those of make test-fast")


def make_policy(critic="", critic_layers=2, seed=0, **sizes):
    """An untrained pi0; unlike that of a new critic, the last layer of its value head is not zero."""
    torch.manual_seed(seed)
    sizes = dict(vision_depth=1, depth=2) | sizes
    policy = Policy(dataclasses.replace(TINY, critic=critic, critic_layers=critic_layers, **sizes), STATS)
    policy.tokenizer_json = (CHECKPOINTS / "tiny/tokenizer.json").read_text()
    if critic:
        for parameter in policy.value_head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return policy.eval()


def observe(n, seed=0):
    """Tabletop scenes, of several instructions of different length."""
    return make_envs("tabletop", n, seed).reset()[0]


def encode(policy, n, seed=0):
    with torch.no_grad():
        return policy.encode(policy.preprocess(observe(n, seed)))


def kept(policy, T, N, prefix, inputs=None):
    """Prefixes in which T * N rows have been put already."""
    prefixes = Prefixes(policy, T, N, prefix, inputs or {})
    for t in range(T):
        turn = slice(t * N, (t + 1) * N)
        rows = {name: field[turn] for name, field in (inputs or {}).items()}
        prefixes.put(t, type(prefix)(*(field[turn] for field in prefix)), rows)
    return prefixes


def turn(batch, t):
    """The prefix of turn t, from a batch of a frozen VLM."""
    N = batch.prefixes.N
    ((_, prefix),) = batch.prefixes.encoded(make_policy(), [torch.arange(t * N, (t + 1) * N)])
    return prefix


class Silent(list):
    """A progress bar that says nothing."""

    def set_postfix_str(self, text):
        pass

    def update(self):
        pass


def wrapped(owner, name, wrap):
    """Something broken: a function that patches `owner.name` to be wrap(the real one)."""
    return lambda patch: patch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.fixture
def one_line_error(capsys):
    """Calls a function that has to end with exit code 2 and one line on stderr, and returns the line."""

    def call(function, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        out, message = capsys.readouterr()
        assert stop.value.code == 2 and not out
        assert message.startswith("error: ") and message.count("\n") == 1 and message.endswith("\n")
        return message

    return call


@pytest.fixture(scope="session", autouse=True)
def asset_folder(tmp_path_factory):
    """Where simulators look, before a server forks their processes and before mani_skill is imported."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        if find_spec(PACKAGES) is None:  # the original ones are not here
            patch.setenv("LIBERO_ASSETS", str(folder / "libero_assets_256px"))
        patch.setenv("MS_ASSET_DIR", str(folder))
        patch.setenv("RL4VLA_ASSETS", str(folder / "carrot"))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def assets(asset_folder):
    """The assets of LIBERO, SIMPLER's tasks and put-on-plate, unpacked."""
    for path in (Path(__file__).parent / "assets").glob("*.tar.xz"):
        with tarfile.open(path) as archive:
            archive.extractall(asset_folder, filter="data")
