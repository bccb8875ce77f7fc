"""Is LIBERO's soft reset, which keeps the compiled scene, to the last bit the hard one, which builds it anew?

`simulators/libero.py` resets softly, as a build takes seconds. Of every task of the suites one initial state
is taken twice: after an episode's steps in another state, softly, and in a scene that has just been built.
Then both take the same ten steps, and every number of the physics is compared.

    python benchmark/libero_resets.py                 # the four suites of ten tasks; half an hour on one core
    python benchmark/libero_resets.py libero_goal
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from simulators.libero import Libero

SUITES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (10, 7))


def physics(simulator, task, state):
    """Positions, velocities and what is observed, at the beginning and after each of ten steps."""
    simulator.reset(task, state)
    rows = []
    for action in [None, *ACTIONS]:
        if action is not None:
            simulator.step(action)
        data = simulator.env.sim.data
        rows.append(np.concatenate([data.qpos, data.qvel, data.xpos.ravel(), simulator.observe()["state"]]))
    return np.stack(rows)


def main(suites):
    differ = []
    for suite in suites:
        for task in tqdm(range(10), desc=suite):
            soft = Libero(suite, "state", "paper")
            physics(soft, task, 49)
            kept, built = physics(soft, task, task), physics(Libero(suite, "state", "paper"), task, task)
            if not np.array_equal(kept, built):
                differ.append(f"{suite} {task}")
                tqdm.write(f"{suite}, task {task}: up to {np.abs(kept - built).max():.1e}")
            soft.env.close()
    print(f"{10 * len(suites)} tasks, {soft.about}: {len(differ)} differ {', '.join(differ)}")


if __name__ == "__main__":
    main(sys.argv[1:] or SUITES)
