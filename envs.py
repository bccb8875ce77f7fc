"""One make_envs() for every simulator: a vector of environments stepped in chunks of actions.

    envs = make_envs("tabletop", num_envs=256, seed=1)
    obs, info = envs.reset()                                               # {"images", "state", "prompt"}
    obs, reward, terminated, truncated, info = envs.step_chunk(actions)    # (N, C, D) -> reward (N, C)

The observation is {"images": (N, cams, H, W, 3) uint8, "state": (N, S) float32, "prompt": [str] * N}. Success
is a true end (terminated); the step limit is not (truncated), so a value function bootstraps there from the
observation the episode ended with, info["final_obs"]. `python envs.py --check` tries each simulator.

The contract. A simulator is a class in a file of simulators/ and a line in SIMULATORS. It is one environment:

    env_ids                      of the class: the ids that it knows; * stands for anything
    trials                       of the class: pairs of env_id and obs_mode, which --check tries
    __init__(env_id, obs_mode, protocol)
    prompts                      {task: instruction}
    action_dim                   D
    max_episode_steps            the step limit under that protocol; it may grow within an episode
    num_eval_states              per task: the initial states 0, 1, ... are those of an evaluation
    train_states                 (low, high): training draws its initial states from these
    reset(task, state)           begins an episode: the index of a task, the number of an initial state
    observe()                    {"images": (cams, H, W, 3) uint8, "state": (S,) float32}; with "prompt" too,
    more_prompts                 a list of all such, where an instruction is not always its task's
    step(action)                 (reward, success), for an action (D,) in [-1, 1]
    render(size)                 a picture for people, (size, size, 3) uint8
    expert_action()              optional: the action (D,) of a scripted expert
    targets(), places()          optional, for stage 0 of flow_sft.py: where source and destination of the
                                 instruction are, (W,), and where everything is, in units of which the gripper
                                 reaches 0.16. Then there is expert_action(aim_error), and the error is (W,)
    image_size                   optional, of the class: the size of its pictures. Then __init__ takes another
    about                        optional: what the protocol line of an evaluation has to say of it
    batch                        optional, of the class: many of it at once, see batch_envs.py
    variations                   optional, of the class: {env_id: {the id of an unseen variation: its group}}

What a user has to put right (assets, an unknown name) is a ValueError of one line. Any other exception, and
NaN in state or reward, is a breakdown: the simulator is built anew and its episode dropped. `Simulators` in
vector_envs.py makes a vector of such classes. A simulator that steps many environments at once, the tabletop,
is a gymnasium VectorEnv with make_envs' arguments instead, and does itself what `Simulators` does; it reads
its max_episode_steps in every step, which make_envs may have lowered.
"""

import difflib
import fnmatch
import functools
import os
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np

from batch_envs import Batch
from flags import fail
from vector_envs import Simulators, select_rows  # noqa: F401  # the scripts know one place

SIMULATORS = {  # what an env_id begins with: the class, imported when it is asked for
    "tabletop": "simulators.tabletop:Tabletop",
    "tabletop_ood": "simulators.tabletop_shifts:ShiftedTabletop",
    "metaworld": "simulators.metaworld:MetaWorld",
    "libero_goal_": "simulators.libero_experts:LiberoExperts",
    "libero": "simulators.libero:Libero",
    "maniskill_25": "simulators.put_on_plate:PutOnPlate",
    "maniskill": "simulators.maniskill:ManiSkill",
    "calvin": "simulators.calvin:Calvin",
}


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    partial_reset: bool = True,
    group_size: int = 1,
    obs_mode: str = "rgb",
    protocol: str = "paper",
    image_size: int | None = None,
    sim_device: str = "cpu",
    patience: float = 300,
    max_episode_steps: int | None = None,
) -> gym.vector.VectorEnv:
    """`partial_reset`: an environment whose episode ended starts a new one instead of waiting for reset().

    `group_size`: at a reset, so many neighbours start from the same state and task. Not by a partial reset.
    `obs_mode`: "state" is without pictures, and the state is all that the simulator tells; "fast" pictures
    are without shadows, and MetaWorld and LIBERO draw them at `image_size`, the policy's, not at their own.
    `protocol`: whose step limit, where openpi's or lerobot's is not the paper's.
    `sim_device`: "cuda" is ManiSkill's batch on a GPU; else simulators are on the CPU, in processes.
    `patience`: seconds after which a process in which nothing has moved is taken to hang.
    `max_episode_steps`: a step limit below the protocol's.
    """
    simulator = find_simulator(env_id)
    if num_envs < 1:
        fail(f"num_envs must be at least 1, got {num_envs}")
    if group_size < 1 or num_envs % group_size:
        fail(f"group_size {group_size} does not divide num_envs {num_envs}")
    if sim_device == "cuda":
        if not hasattr(simulator, "batch"):
            fail(f"--sim-device cuda: {env_id} runs on the CPU only, ManiSkill's environments on a GPU too")
        if partial_reset:
            fail("--sim-device cuda: a batch begins its episodes together, give --no-partial-reset too")
        build = functools.partial(simulator.batch, env_id, obs_mode, protocol, device=sim_device)
        envs = Batch(build, env_id, num_envs, seed, group_size)
    elif issubclass(simulator, gym.vector.VectorEnv):
        envs = simulator(env_id, num_envs, seed, partial_reset, group_size, obs_mode, protocol)
    else:
        drawn = obs_mode == "fast" and image_size and hasattr(simulator, "image_size")
        size = {"image_size": image_size} if drawn else {}
        build = functools.partial(simulator, env_id, obs_mode, protocol, **size)
        envs = Simulators(env_id, build, num_envs, seed, partial_reset, group_size, patience)
    if max_episode_steps:
        if max_episode_steps > envs.max_episode_steps:
            fail(f"--max-episode-steps {max_episode_steps}: {env_id} ends after {envs.max_episode_steps}")
        envs.max_episode_steps = envs.limit = max_episode_steps
    return envs


def find_simulator(env_id):
    for family, place in SIMULATORS.items():
        if env_id.startswith(family):
            simulator = pkgutil.resolve_name(place)
            if any(fnmatch.fnmatchcase(env_id, known) for known in simulator.env_ids):
                return simulator
    known = [list(pkgutil.resolve_name(place).env_ids) for place in SIMULATORS.values()]
    nearest = difflib.get_close_matches(env_id, sum(known, []), n=5) or [ids[0] for ids in known]
    fail(f"unknown env_id {env_id!r}; did you mean one of: {', '.join(nearest)}?")


def find_variations(env_id):
    """{env_id: group}: what --variations evaluates on besides, of an environment that is trained on."""
    known = {}
    for place in SIMULATORS.values():
        known |= getattr(pkgutil.resolve_name(place), "variations", {})
    if env_id not in known:
        fail(f"--variations: there are none of {env_id}, only of {', '.join(known)}")
    return known[env_id]


def write_gif(path: str | Path, frames: Sequence[np.ndarray], captions: Sequence[str] = (), fps: int = 10):
    """Frames (T, H, W, 3) uint8 of square pictures side by side as an animation. Under each picture stands
    its caption, in turn; a single caption is of all of them."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    pictures = [Image.fromarray(frame) for frame in np.asarray(frames)]
    if captions:
        (width, height), font = pictures[0].size, ImageFont.load_default(size=14)
        columns = width // height if len(captions) > 1 else 1
        letters = width // columns // 8  # fit into a line
        texts = [textwrap.fill(captions[i % len(captions)], letters) for i in range(columns)]
        strip = 6 + 17 * max(text.count("\n") + 1 for text in texts)
        pictures = [ImageOps.expand(picture, (0, 0, 0, strip), "white") for picture in pictures]
        for draw in map(ImageDraw.Draw, pictures):
            for i, text in enumerate(texts):
                draw.text((6 + i * width // columns, height + 3), text, "black", font)
    temporary, (first, *others) = f"{path}.tmp", pictures
    first.save(temporary, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    os.replace(temporary, path)


def check():
    """A table of what works here: each simulator for some steps, in a process of its own."""
    print(f"| {'simulator':22} | {'mode':5} | result\n| {'-' * 22} | ----- | ------")
    for place in SIMULATORS.values():
        for trial in pkgutil.resolve_name(place).trials:
            command = [sys.executable, __file__, "--try", *trial]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            told = (done.stderr if done.returncode else done.stdout).strip() or f"exit code {done.returncode}"
            print("| {:22} | {:5} |".format(*trial), told.splitlines()[-1].removeprefix("error: "))


def attempt(env_id, mode):
    envs = make_envs(env_id, 2, 0, obs_mode=mode)
    envs.reset()
    obs, *_ = envs.step_chunk(np.zeros((2, 5, *envs.single_action_space.shape)))
    envs.close()
    about = f", {envs.about}" if getattr(envs, "about", "") else ""
    print(f"works: images {obs['images'].shape[1:]}, state {obs['state'].shape[1]}{about}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--try"]:
        attempt(*sys.argv[2:])
    else:
        check() if sys.argv[1:] == ["--check"] else fail("use: python envs.py --check")
