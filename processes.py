"""What runs in a process of simulators: a `Block` of them, which does what `Simulators` asks for.

A simulator that breaks down ends neither its process nor the others in it, and no process outlives the run.
"""

import fcntl
import math
import os
import sys
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process

import numpy as np

SERVER = get_context("forkserver")
ADVICE = " (make install; as root, make apt; make check)"


def start(function, *arguments):
    """A process for function(pipe, *arguments), and the other end of the pipe."""
    pipe, its_end = SERVER.Pipe()
    process = SERVER.Process(target=run, args=(its_end, function, *arguments), daemon=True)
    process.start()
    its_end.close()
    return process, pipe


def run(pipe, function, *arguments):
    """In the process: it ends when the run does, however that ends, and whatever this one is busy with."""
    os.setpgid(0, 0)  # Ctrl-C, which the terminal sends to the run's group, is for the run to answer
    sentinel = parent_process().sentinel  # a pipe that closes with the run. That is to raise SIGIO, which
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())  # ends a process: also inside of a simulator's step
    fcntl.fcntl(sentinel, fcntl.F_SETFL, os.O_ASYNC)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the run has closed the pipe
        function(pipe, *arguments)


def describe(pipe, build):
    """What has to be known before the others begin, or in a line why it cannot be."""
    try:
        simulator = build()
        names = "prompts", "action_dim", "max_episode_steps", "num_eval_states", "train_states"
        told = {name: getattr(simulator, name) for name in names}
        simulator.reset(0, 0)
        told |= {key: value.shape for key, value in simulator.observe().items() if key != "prompt"}
        optional = {"more_prompts": [], "about": ""}
        told |= {name: getattr(simulator, name, usual) for name, usual in optional.items()}
        places = [name for name in ("targets", "places") if hasattr(simulator, name)]
        told["privileged"] = {name: getattr(simulator, name)().shape for name in places}
    except ModuleNotFoundError as error:
        told = f"{build.func.__name__} is not installed here ({error}): make install"
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = what if isinstance(error, ValueError) else what + ADVICE
    pipe.send(told)


def serve(pipe, *arguments):
    """Does what `Simulators` asks a block for."""
    block = Block(*arguments)
    while True:
        method, arguments = pipe.recv()
        block.broken = {}
        answer = getattr(block, method)(*arguments)
        pipe.send((answer, block.prompt, block.broken))


class Block:
    """Some simulators in one process, stepped one after the other.

    `shared` is memory of all environments, of which `rows` are here. The run reads observations there, and
    where each episode is, also when this process has died.
    """

    def __init__(self, build, shared, rows):
        self.build, self.rows, self.count = build, rows, rows.stop - rows.start
        self.shared = {name: np.ndarray(*array)[rows] for name, array in shared.items()}
        self.simulators = [None] * self.count  # built when they are needed
        self.prompt, self.broken = np.full(self.count, None), {}  # {row: what happened}

    @contextmanager
    def _guard(self, row):
        """A simulator that breaks down in here is given up; the others go on."""
        self.shared["busy"][row] = True
        try:
            yield
        except Exception as error:
            self.simulators[row] = None
            self.broken[row] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.shared["busy"][row] = False

    def _observe(self, row):
        seen = self.simulators[row].observe()
        if not np.isfinite(seen["state"]).all():
            raise FloatingPointError("its state is NaN or infinite")
        self.shared["images"][row], self.shared["state"][row] = seen["images"], seen["state"]
        self.prompt[row] = seen.get("prompt")

    def reset(self, begin, task, state):
        """Begins the episodes of `task`, `state` where `begin`; each (count,)."""
        for row in np.flatnonzero(begin):
            with self._guard(row):
                if self.simulators[row] is None:
                    self.simulators[row] = self.build()
                    if "torch" in sys.modules:
                        sys.modules["torch"].set_num_threads(1)
                self.simulators[row].reset(task[row], state[row])
                self._observe(row)

    def step(self, actions, alive, record, draws=True, limit=math.inf):
        """A chunk (count, C, D). Pictures for the policy are drawn once, after it."""
        actions, chunk_len, length = np.clip(actions, -1, 1), actions.shape[1], self.shared["length"]
        reward = np.zeros(actions.shape[:2], np.float32)
        success, truncated = np.zeros((2, self.count), bool)
        record = int(np.clip(record - self.rows.start, 0, self.count))
        film = np.zeros((chunk_len, record, 256, 256, 3), np.uint8)
        for row, simulator in enumerate(self.simulators):
            with self._guard(row):
                for c in range(chunk_len * alive[row]):
                    reward[row, c], success[row] = simulator.step(actions[row, c])
                    length[row] += 1
                    if not math.isfinite(reward[row, c]):
                        raise FloatingPointError("its reward is NaN or infinite")
                    if row < record:
                        film[c:, row] = simulator.render(256)
                    most = min(limit, simulator.max_episode_steps)
                    truncated[row] = not success[row] and length[row] >= most
                    if success[row] or truncated[row]:
                        break
                if alive[row]:
                    if draws:
                        self._observe(row)
                elif row < record and simulator is not None:
                    film[:, row] = simulator.render(256)
        return reward, success, truncated, film

    def expert_action(self, alive, *aim_error):
        for row in np.flatnonzero(alive):
            with self._guard(row):
                error = (one[row] for one in aim_error)
                self.shared["action"][row] = self.simulators[row].expert_action(*error)

    def tell(self, alive, what):
        """Privileged places, for stage 0 of flow_sft.py; no observation has them."""
        for row in np.flatnonzero(alive):
            with self._guard(row):
                self.shared[what][row] = getattr(self.simulators[row], what)()
