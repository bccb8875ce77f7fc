"""LIBERO-Goal's tasks with scripted experts: demonstrations, and where things are for stage 0 of flow_sft.py.

`libero_goal_put_the_bowl_on_the_plate` and its siblings are one task each, `libero_goal_experts` is all four.
The environment is LIBERO's (libero.py): states, actions, pictures, success and initial states are the same.
What is added is privileged and no part of an observation. An expert grasps a thing, lifts it, carries it over
its destination and lets it go. It remembers nothing, so it can be asked at any moment: also when the thing
has slipped, or when somebody else has acted before. Its motion changes little where the scene does: one that
jumps between up and down is hard to learn from.
"""

import numpy as np

from simulators.libero import Libero

MIDDLE, UNIT = np.array([-0.05, 0, 0.95]), 8  # of the table, and of places: 0.16 are 2 cm
RIM = (0, 0.06, 0.025)  # of the bowl: the fingers close across it
TASKS = {  # what to grasp, where the hand is over it then, where it has to go, and how far above that
    "put_the_bowl_on_the_plate": ("akita_black_bowl_1", RIM, "plate_1", 0.04),
    "put_the_bowl_on_the_stove": ("akita_black_bowl_1", RIM, "flat_stove_1_cook_region", 0.03),
    "put_the_bowl_on_top_of_the_cabinet": ("akita_black_bowl_1", RIM, "wooden_cabinet_1_top_region", 0.04),
    "put_the_cream_cheese_in_the_bowl": ("cream_cheese_1", (0, 0, 0), "akita_black_bowl_1", 0.06),
}
SEEN = "akita_black_bowl_1", "cream_cheese_1", "wine_bottle_1", "plate_1", "flat_stove_1", "wooden_cabinet_1"
OPENS, CLOSES = -1, 1


class LiberoExperts(Libero):
    env_ids = [*(f"libero_goal_{task}" for task in TASKS), "libero_goal_experts"]
    trials = (("libero_goal_put_the_bowl_on_the_plate", "state"),)

    def __init__(self, env_id, obs_mode, protocol, **size):
        super().__init__("libero_goal", obs_mode, protocol, **size)
        name = env_id.removeprefix("libero_goal_")
        self.prompts = {task: self.prompts[task] for task in TASKS if name in (task, "experts")}

    def _build(self, task):
        """These tasks differ in goal and initial states only, so the compiled scene stays."""
        if self.env is None:
            return super()._build(task)
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        self.env.env.parsed_problem = robosuite_parse_problem(self.problem(task))
        self._read_states(task)

    def reset(self, task, state):
        super().reset(task, state)
        self.source, self.grip, self.destination, self.above = TASKS[list(self.prompts)[task]]

    def place(self, name):
        """Of a thing, or of a region of a piece of furniture."""
        data, bodies = self.env.sim.data, self.env.env.obj_body_id
        return (data.body_xpos[bodies[name]] if name in bodies else data.get_site_xpos(name)).copy()

    def places(self):
        """Privileged: where the hand and the things of the scene are (7, 3)."""
        seen = [self.obs["robot0_eef_pos"], *map(self.place, SEEN)]
        return ((np.stack(seen) - MIDDLE) * UNIT).astype(np.float32)

    def targets(self):
        """Privileged: where source and destination of the instruction are (6,)."""
        both = np.stack([self.place(self.source), self.place(self.destination)])
        return ((both - MIDDLE) * UNIT).flatten().astype(np.float32)

    def expert_action(self, aim_error=0):
        """The scripted expert's, for a hand that points down, as at a reset; aim_error (6,) moves its aim."""
        moved = (np.zeros(6) + aim_error) / UNIT
        hand, width = self.obs["robot0_eef_pos"], np.ptp(self.obs["robot0_gripper_qpos"])
        to_grasp = self.place(self.source) + self.grip - hand
        # the fingers are around it: neither open nor closed on nothing
        grasps = 0.003 < width < 0.075 and np.linalg.norm(to_grasp) < 0.03
        to_grasp += moved[:3]
        to_release = self.place(self.destination) + moved[3:] + self.grip + [0, 0, self.above] - hand
        # down a funnel, whose wall is three times as high above its bottom as far from its axis
        if not grasps:
            gripper = CLOSES if np.linalg.norm(to_grasp) < 0.015 else OPENS
            motion = to_grasp + [0, 0, np.clip(3 * np.linalg.norm(to_grasp[:2]) - 0.03, 0, 0.1)]
            motion[2] += 0.06 * (width < 0.075)  # where they open
            motion[:2] *= np.clip(1.25 - motion[2] / 0.08, 0.2, 1)  # up first, where it is below that
        else:
            over = np.linalg.norm(to_release[:2])
            gripper = OPENS if over < 0.02 and to_release[2] > -0.025 else CLOSES
            motion = to_release + [0, 0, np.clip(3 * over - 0.03, 0, 0.12)]
            motion[:2] *= np.clip(1.4 - motion[2] / 0.05, 0, 1)
            fingers = self.env.sim.data.qvel[self.env.robots[0]._ref_gripper_joint_vel_indexes]
            if gripper == OPENS or np.abs(fingers).max() > 0.03:  # they are on their way
                motion = np.zeros(3)
        return np.array([*np.clip(motion / 0.05, -1, 1), 0, 0, 0, gripper], np.float32)
