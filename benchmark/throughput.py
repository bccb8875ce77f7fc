"""Steps per second of make_envs against each simulator's own loop, in as many processes, on the same cores.

The bare loop is what somebody writes who has only the simulator: its own class, its own step(), one process
each, none of which waits for another. make_envs steps in chunks, its processes wait for the slowest, and it
draws after a chunk, not after every step. The sides take turns of a few seconds, so that other work on the
machine slows both; the ratio is the median over the rounds.

    python benchmark/throughput.py                                      # about ten minutes; prints Markdown
    python benchmark/throughput.py --only metaworld-state --rounds 9    # one row
"""

import multiprocessing
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import make_envs
from simulators.libero import import_libero
from simulators.maniskill import check_maniskill

ROWS = {  # name: env_id, obs_mode, environments per process of make_envs, steps of the bare loop's episodes
    "metaworld-state": ("metaworld_push-v3", "state", 8, 500),
    "metaworld-rgb": ("metaworld_push-v3", "rgb", 1, 500),
    "libero-state": ("libero_goal", "state", 2, 1000),
    "libero-rgb": ("libero_goal", "rgb", 1, 1000),
    "pickcube-state": ("maniskill:PickCube-v1", "state", 8, 50),
    "pickcube-rgb": ("maniskill:PickCube-v1", "rgb", 1, 50),
    "carrot-rgb": ("maniskill_carrot", "rgb", 1, 60),
    "plate-rgb": ("maniskill_25main", "rgb", 1, None),  # these two are this project's own: no bare loop
    "calvin-rgb": ("calvin_d", "rgb", 1, None),
}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(ROWS)
    """rows of the table"""
    processes: int = 2
    """of each side, on as many cores"""
    chunk_len: int = 5
    """actions per step_chunk of make_envs, steps per picture of the second bare loop"""
    rounds: int = 5
    """turns of each side"""
    seconds: float = 3.0
    """of stepping in a turn"""


def small_actions(*shape):
    """A tenth of the range; the last number, in all of them the gripper's, at one end."""
    actions = np.random.default_rng().uniform(-0.1, 0.1, shape)
    actions[..., -1] = -1
    return actions.astype(np.float32)


def bare_env(env_id, draw):
    """The simulator's own reset, its step, and what draws a picture (None: nothing, or step itself).

    `draw`: "never", "always" (at every step), or "asked", after a chunk.
    """
    if env_id.startswith("metaworld"):
        from metaworld import env_dict

        cls = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["push-v3-goal-observable"]
        env = cls(seed=0, render_mode="rgb_array")  # 480 x 480
        env.mujoco_renderer.camera_id = env.model.camera("corner2").id
        return env.reset, env.step, None if draw == "never" else env.render
    if env_id.startswith("libero"):
        folder = import_libero()
        from libero.libero.benchmark import task_maps
        from libero.libero.envs import OffScreenRenderEnv
        from libero.libero.envs.env_wrapper import ControlEnv

        file = f"{folder}/bddl_files/{env_id}/{next(iter(task_maps[env_id]))}.bddl"
        if draw == "always":
            env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
            return env.reset, env.step, None
        asked, views = draw == "asked", ("agentview", "robot0_eye_in_hand")
        env = ControlEnv(bddl_file_name=file, use_camera_obs=False, has_offscreen_renderer=asked)
        picture = lambda: [env.sim.render(256, 256, camera_name=view) for view in views]  # noqa: E731
        return env.reset, env.step, picture if asked else None
    import gymnasium as gym

    full, rgb = "PickCube-v1", "rgb"
    if env_id == "maniskill_carrot":
        full, rgb = "PutCarrotOnPlateInScene-v1", "rgb+segmentation"  # its only mode
    backends = {"sim_backend": "physx_cpu", "render_backend": check_maniskill(full, "rgb")}
    env = gym.make(full, obs_mode=rgb if draw == "always" else "state", **backends)
    return env.reset, env.step, env.unwrapped.get_sensor_images if draw == "asked" else None


def bare_loop(pipe, env_id, draw, episode, chunk_len, dim):
    """A process. It is told for how many seconds to step and answers with its steps per second."""
    import torch

    torch.set_num_threads(1)  # as in make_envs
    reset, step, picture = bare_env(env_id, draw)
    length = episode
    while True:
        seconds, steps, taken = pipe.recv(), 0, 0.0
        while taken < seconds or not steps:
            if length + chunk_len > episode:
                reset()
                length = 0
            actions, began = small_actions(chunk_len, dim), time.perf_counter()
            for i, action in enumerate(actions, start=1):
                step(action)
                if picture and (draw == "always" or i == chunk_len):
                    picture()
            taken += time.perf_counter() - began
            length, steps = length + chunk_len, steps + chunk_len
        pipe.send(steps / taken)


def measure(name, args):
    """Steps per second (rounds,) of make_envs and of the bare loops, which are added up."""
    env_id, mode, per_process, episode = ROWS[name]
    n = per_process * args.processes
    envs = make_envs(env_id, n, 0, partial_reset=False, obs_mode=mode, protocol="openpi")
    dim, first = envs.single_action_space.shape[0], {"eval_states": np.zeros(n, int)}
    # SIMPLER's tasks draw at every step, whether somebody looks or not
    draws = ["never"] if mode == "state" else ["always"] if name == "carrot-rgb" else ["always", "asked"]
    draws = draws if episode else []
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for draw in draws:
        pairs = [context.Pipe() for _ in range(args.processes)]
        for _, end in pairs:
            told = end, env_id, draw, episode, args.chunk_len, dim
            processes.append(context.Process(target=bare_loop, args=told, daemon=True))
            processes[-1].start()
            end.close()  # so that a process that breaks down is noticed
        pipes[draw] = [end for end, _ in pairs]

    def turn(side, seconds):
        for pipe in pipes.get(side, []):
            pipe.send(seconds)
        if side in pipes:
            return sum(pipe.recv() for pipe in pipes[side])
        steps, taken = 0, 0.0
        while taken < seconds or not steps:
            if not envs.alive.all():
                envs.reset(options=first)
            actions, began = small_actions(n, args.chunk_len, dim), time.perf_counter()
            steps += envs.step_chunk(actions)[-1]["steps"].sum()
            taken += time.perf_counter() - began
        return steps / taken

    sides = ["make_envs", *draws]
    for side in sides:
        turn(side, 0)  # builds, compiles, resets
    rounds = [[turn(side, args.seconds) for side in sides] for _ in range(args.rounds)]
    envs.close()
    for process in processes:
        process.kill()
    return np.transpose(rounds)


def main(args):
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.processes])
    print("| environment | obs mode | make_envs | bare loop | ratio | bare, drawn once a chunk | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only:
        ours, *bare = measure(name, args)
        cells = [f"`{ROWS[name][0]}`", ROWS[name][1], f"{np.median(ours):.1f}"]
        for theirs in bare:
            ratio = ours / theirs
            cells += [f"{np.median(theirs):.1f}"]
            cells += [f"**{np.median(ratio):.2f}** ({ratio.min():.2f} to {ratio.max():.2f})"]
        print("|", " | ".join(cells + ["-"] * (7 - len(cells))), "|", flush=True)
    print(
        f"\nExecuted steps per second of {args.processes} processes, medians of {args.rounds} turns of "
        f"{args.seconds:g} s; ratio: median, lowest, highest. Chunks of {args.chunk_len}, small random "
        "actions; resets are not timed. One environment per process (make_envs without pictures: 8, LIBERO "
        "2). A bare loop with pictures draws at every step, as its own interface does; that of the last two "
        f"columns is asked for them after every {args.chunk_len}th. MUJOCO_GL={os.environ['MUJOCO_GL']}, "
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
