"""Where CALVIN's 1,000 evaluation chains come from: draws them and their desks.

A chain is five tasks of different categories, drawn at random from an initial state of the desk until what
each task changes is unambiguous, so that the next one is possible too. A desk's numbers are its symbolic
state, with the turns of the blocks drawn by a hash of it. The seeds are upstream's (github.com/mees/calvin,
MIT), and so are the chains, all of them.

    python simulators/calvin_chains.py    # about a minute
"""

import json
from itertools import product
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
TASKS = json.loads(FILE.with_name("calvin.json").read_text())  # 34, in the order that chains are drawn from
COLOURS = "red", "blue", "pink"
ROBOT = [0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963, -1.21779124]
ROBOT += [1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0]  # the same for all


def initial_desks():
    """192 symbolic states: one or two blocks on the table, never two in the same half of the cabinet."""
    names = "led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped"
    places, desks = ("table", "slider_right", "slider_left"), []
    for values in product((0, 1), (0, 1), ("right", "left"), ("closed", "open"), *[places] * 3, (0,)):
        table, right, left = (values.count(place) for place in places)
        if table in (1, 2) and right < 2 and left < 2:
            desks.append(dict(zip(names, values)))
    return desks


def make_rules():
    """{task: [(what it needs of a symbolic state, what it changes), ...]}."""
    free, rules = {"grasped": 0}, {task: [] for task in TASKS}
    for side, other in (("left", "right"), ("right", "left")):
        rules[f"move_slider_{side}"] = [(free | {"slider": other}, {"slider": side})]
    rules["open_drawer"] = [(free | {"drawer": "closed"}, {"drawer": "open"})]
    rules["close_drawer"] = [(free | {"drawer": "open"}, {"drawer": "closed"})]
    for light in ("lightbulb", "led"):
        rules[f"turn_on_{light}"] = [(free | {light: 0}, {light: 1})]
        rules[f"turn_off_{light}"] = [(free | {light: 1}, {light: 0})]
    for colour in COLOURS:
        block, lifted = f"{colour}_block", {f"{colour}_block": "grasped", "grasped": 1}
        for task in (f"{verb}_{block}_{side}" for verb in ("rotate", "push") for side in ("left", "right")):
            rules[task] = [(free | {block: "table"}, {})]
        rules[f"lift_{block}_table"] = [(free | {block: "table"}, lifted)]
        rules[f"lift_{block}_drawer"] = [(free | {block: "drawer", "drawer": "open"}, lifted)]
        for side, other in (
            ("left", "right"),
            ("right", "left"),
        ):  # a half is open when the door is not there
            rules[f"lift_{block}_slider"] += [(free | {block: f"slider_{side}", "slider": other}, lifted)]
            rules["place_in_slider"] += [(lifted | {"slider": side}, free | {block: f"slider_{side}"})]
        rules["place_in_drawer"] += [(lifted | {"drawer": "open"}, free | {block: "drawer"})]
        others = [f"{other}_block" for other in COLOURS if other != colour]
        for other in others:
            stack = {block: "stacked_top", other: "stacked_bottom"}
            rules["stack_block"] += [(lifted | {other: "table"}, free | stack)]
            rules["unstack_block"] += [(free | stack, {block: "table", other: "table"})]
        for halves in product(("slider_right", "slider_left"), repeat=2):
            needed = free | {block: "table", "drawer": "open", **dict(zip(others, halves))}
            rules["push_into_drawer"] += [(needed, {block: "drawer"})]
    return rules


def feasible(desk, chain, rules):
    """Tasks of different categories, and what each of them changes is unambiguous."""
    if len({TASKS[task]["category"] for task in chain}) < len(chain):
        return False
    for task in chain:
        changes = [change for needed, change in rules[task] if needed.items() <= desk.items()]
        if len(changes) != 1:
            return False
        desk = desk | changes[0]
    return True


def draw_chains(number, desk, count, rules):
    """`count` feasible chains from a desk: [its number, the numbers of five tasks]."""
    rng, names, chains = np.random.RandomState(number), list(TASKS), []
    while len(chains) < count:
        chain = rng.permutation(len(names))[:5].tolist()
        if feasible(desk, [names[task] for task in chain], rules):
            chains.append([number, *chain])
    return chains


def make_chains():
    """The evaluation's 1,000, in its order. Takes a minute."""
    desks, rules, chains = initial_desks(), make_rules(), []
    for number, share in enumerate(np.array_split(range(1000), len(desks))):
        chains += draw_chains(number, desks[number], len(share), rules)
    np.random.RandomState(0).shuffle(chains)
    return chains


def layout(desk):
    """A desk in numbers (24,): slide, drawer, button, switch, bulb, LED, red, blue and pink block."""
    seed = 0  # FNV-1 of how Python prints the values
    for byte in str(desk.values()).encode("utf-16-le"):
        seed = (seed * 16777619 % 2**32) ^ byte
    rng, table = np.random.RandomState(seed), [[0.0500000896, -0.120000177, 0.459990009]]
    table.append([0.229995412, -0.11999514, 0.45999001])
    rng.shuffle(table)
    cabinet = {"slider_left": -0.240851662, "slider_right": 0.070341633}
    slide, drawer = 0.28 * (desk["slider"] == "left"), 0.22 * (desk["drawer"] == "open")
    numbers = [slide, drawer, 0, 0.088 * desk["lightbulb"], desk["lightbulb"], desk["led"]]
    for colour in COLOURS:
        place = desk[f"{colour}_block"]
        second = colour == "pink" or (colour == "blue" and desk["red_block"] == "table")
        where = [cabinet[place], 0.0924044687, 0.460990009] if place in cabinet else table[second]
        numbers += [*where, 0, 0, rng.uniform(3 * np.pi / 8, 5 * np.pi / 8)]
    return np.array(numbers)


if __name__ == "__main__":
    told = {
        "robot": ROBOT,
        "desks": [layout(desk).tolist() for desk in initial_desks()],
        "chains": make_chains(),
    }
    FILE.write_text(json.dumps(told).replace("], [", "],\n [") + "\n")
