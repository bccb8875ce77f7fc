"""The benchmark scripts: the closed forms of docs/math.md, and the report on runs."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HYBRID

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import credit  # noqa: E402
import draw  # noqa: E402
import drift  # noqa: E402
import full_size  # noqa: E402
import gradient  # noqa: E402
import marginals  # noqa: E402
import plot  # noqa: E402
import rl_table  # noqa: E402
import schedules  # noqa: E402
import solvers  # noqa: E402
import variations_table  # noqa: E402
from marginals import gaussian_end, toy_gradient, toy_return, toy_reward, toy_scores, toy_step  # noqa: E402

import flow_sde_ppo  # noqa: E402
from envs import make_envs  # noqa: E402
from flow_sde_ppo import transition  # noqa: E402
from pi_models import load_policy  # noqa: E402

torch.set_num_threads(1)
WEIGHTS = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.3, 0.1], [0.2, 0.2]]).double()  # (K, 2)


def hybrid(K):
    return [(k,) for k in range(K)]


def two_layer(K):
    return [tuple(range(K))]


def drawn_only(noisy_steps, K):
    return noisy_steps


@pytest.mark.parametrize("noisy_steps", [(), (0,), (2,), (0, 1, 2, 3)])
def test_exact_return_is_the_mean_of_samples(noisy_steps, n=400_000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator).double()
    for k in range(4):
        mu, std = toy_step(x, k, 4, 0.7 if k in noisy_steps else 0.0, WEIGHTS)
        x = mu + std * torch.randn(n, generator=generator).double()
    reward = toy_reward(x)
    error = (reward.std() / n**0.5).item()
    assert error < 1e-3 and abs(toy_return(4, 0.7, noisy_steps, WEIGHTS) - reward.mean()) < 4 * error


@pytest.mark.parametrize("K, a", [(1, 0.5), (2, 0.5), (3, 0.7), (4, 0.5), (4, 1.0)])
def test_two_layer_score_terms_are_the_whole_gradient(K, a):
    assert toy_scores(K, a, two_layer(K))[0] == pytest.approx(toy_gradient(K, a, two_layer(K)), abs=1e-6)


@pytest.mark.parametrize("K, a", [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0), (10, 0.5)])
def test_hybrid_score_term_is_the_part_through_the_drawn_step(K, a):
    score, exact = toy_scores(K, a, hybrid(K))[0], toy_gradient(K, a, hybrid(K))
    assert score == pytest.approx(toy_gradient(K, a, hybrid(K), drawn_only), abs=1e-6)
    assert np.linalg.norm(score) < 0.6 * np.linalg.norm(exact)


def test_hybrid_score_term_is_a_kth_of_the_gradient():
    """In nearly its direction with the paper's K = 4 and a = 0.5, but not where K is 2 and a is 1."""
    for K, factor in ((4, 1.15), (10, 1.15)):
        score, exact = toy_scores(K, 0.5, hybrid(K))[0], toy_gradient(K, 0.5, hybrid(K))
        assert (1 / K < score / exact).all() and (score / exact < factor / K).all()
        assert score @ exact > 0.999 * np.linalg.norm(score) * np.linalg.norm(exact)
    score, exact = toy_scores(2, 1.0, hybrid(2))[0], toy_gradient(2, 1.0, hybrid(2))
    assert score @ exact < 0.8 * np.linalg.norm(score) * np.linalg.norm(exact)


def make_run(folder, iterations=5, eval_freq=2, finished=True, **flags):
    """Iterations of 100 steps and 60 seconds; success in iteration i is i / 10, by the ODE 0.05 more."""
    args = {"exp_name": "flow_sde_ppo", "seed": 1, "eval_freq": eval_freq, "run_dir": str(folder.parent)}
    args |= {"total_timesteps": 100 * iterations + (0 if finished else 1)} | flags
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    with open(folder / "metrics.csv", "w") as file:
        table = csv.writer(file)
        times = "time/rollout time/encode time/update".split()
        table.writerow(["iteration", "global_step", "charts/success_once", *times, "eval/success_rate"])
        evaluated = 0.05 if eval_freq >= 0 else "nan"  # before the first iteration
        for i in range(1, iterations + 1):
            if eval_freq > 0 and i % eval_freq == 0 or eval_freq >= 0 and finished and i == iterations:
                evaluated = i / 10 + 0.05
            table.writerow([i, 100 * i, i / 10, 30, 10, 20, evaluated])
    return folder


def test_evaluations_of_a_run(tmp_path):
    def read(name, **options):
        return [
            curve.tolist() for curve in plot.evaluations(*plot.read_run(make_run(tmp_path / name, **options)))
        ]

    assert read("usual") == [[0, 200, 400, 500], [0, 2, 4, 5], pytest.approx([0.05, 0.25, 0.45, 0.55])]
    assert read("ends", eval_freq=0) == [[0, 500], [0, 5], pytest.approx([0.05, 0.55])]
    assert read("goes on", finished=False) == [[0, 200, 400], [0, 2, 4], pytest.approx([0.05, 0.25, 0.45])]
    assert np.isnan(read("never", eval_freq=-1)[2]).all()


def test_report_tells_what_differs(tmp_path, capsys):
    one = make_run(tmp_path / "one", noise_level=1.0)
    two = make_run(tmp_path / "two", noise_level=0.5, finished=False, ent_coef=0.01)
    picture = tmp_path / "new" / "picture.png"
    plot.main(plot.Args((one, two), picture))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    told = {row[0]: row[1:] for row in rows}
    assert told["ODE success"] == ["55.0%", "45.0%"]
    assert told["with noise, last 10 iterations"] == ["30.0%", "30.0%"]
    assert told["steps"] == ["500", "500, not finished"] and told["minutes"] == ["5.0", "5.0"]
    assert told["noise_level"] == ["1.0", "0.5"] and told["ent_coef"] == ["-", "0.01"]
    assert "seed" not in told and "run_dir" not in told  # the same, and of no interest
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_labels_are_what_differs(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, ent_coef=0.1 * (seed == 3)) for seed in (1, 2, 3)]
    folders.append(make_run(tmp_path / "again", seed=1, ent_coef=0.0))
    runs = [plot.read_run(folder) for folder in folders]
    names = plot.labels(folders, plot.differing_flags(runs))
    assert names == [
        "seed 1, ent_coef 0.0 (1)",
        "seed 2, ent_coef 0.0",
        "seed 3, ent_coef 0.1",
        "seed 1, ent_coef 0.0 (again)",
    ]
    assert plot.labels(folders[:1], plot.differing_flags(runs[:1])) == ["1"]


def test_no_run_is_told_in_one_line(tmp_path, one_line_error):
    run = make_run(tmp_path / "run")
    assert "no args.json" in one_line_error(plot.main, plot.Args((run, tmp_path / "none")))
    (run / "metrics.csv").write_text("iteration,global_step\n")
    assert "no finished iteration" in one_line_error(plot.main, plot.Args((run,)))
    (run / "metrics.csv").write_text("iteration,global_step\n1,many\n")
    assert "many" in one_line_error(plot.main, plot.Args((run,)))
    (run / "args.json").write_text("{")
    assert "not the folder of a run" in one_line_error(plot.main, plot.Args((run,)))
    one_line_error(plot.main, plot.Args(()))
    run = make_run(tmp_path / "other")
    (tmp_path / "file").touch()
    picture = tmp_path / "file" / "picture.png"
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args((run,), picture))
    assert stop.value.code == 2


def test_seeds_are_averaged_at_equal_progress():
    fast = np.array([[0, 100, 200], [0, 1, 2], [0.4, 0.6, 0.6]])
    slow = np.array([[0, 100, 200], [0, 3, 6], [0.4, 0.4, 0.8]])
    steps, times, rates = (x.mean(axis=0) for x in plot.at_equal_progress([fast, slow], points=3))
    assert steps.tolist() == [0, 100, 200]
    assert times.tolist() == [0, 2, 4] and rates.tolist() == pytest.approx([0.4, 0.5, 0.7])


def test_comparison_table_and_picture(tmp_path, capsys):
    flags = dict(env_id="tabletop", checkpoint="sft", num_envs=2, chunk_len=5, denoise_steps=4)
    sampler = {"denoise_steps": 4, "chunk_len": 5}
    interval = {"interval": [0.4, 0.5], "length": 20.0, "episodes": 500, "sampler": sampler}
    for script in plot.SCRIPTS:
        results = []
        if script != "flow_noise_ppo":
            results = [
                {"name": "SFT", "checkpoint": "sft", "deterministic": ode, "success_rate": 0.44} | interval
                for ode in (True, False)
            ]
        for seed in (1, 2):
            run = make_run(tmp_path / f"{script}-{seed}", exp_name=script, seed=seed, **flags)
            results += [
                {"name": script, "checkpoint": f"{run}/checkpoint", "deterministic": ode}
                | interval
                | {"success_rate": 0.5 + 0.1 * seed - 0.05 * (not ode)}
                for ode in (True, False)
            ]
        protocol = {"env_id": "tabletop", "max_episode_steps": 60}
        (tmp_path / f"{script}.json").write_text(json.dumps({"results": results, "protocol": protocol}))
    plot.main(plot.Args((tmp_path,), tmp_path / "compare.png"))
    out = capsys.readouterr().out
    assert "K = 4, chunks of 5." in out
    assert "| Flow-SDE PPO | 60.0% | 70.0% | **65.0%**" in out and "cannot be told apart" in out
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    "drawing", [draw.architecture, draw.two_layer_mdp, draw.shifts], ids=lambda drawing: drawing.__name__
)
def test_no_words_overlap(drawing):
    figure = drawing().figure
    figure.draw_without_rendering()
    words = [text for text in figure.axes[0].texts if text.get_text() and not text.get_rotation()]
    boxes = [text.get_window_extent() for text in words]
    assert len(words) >= 30
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, words[i].get_text()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, words[i].get_text()
        touched = [words[j].get_text() for j in range(i) if box.overlaps(boxes[j])]
        assert not touched, (words[i].get_text(), touched)


# --- variations_table.py ---


def write_report(path, inside, **successes):
    """As of `evaluate.py --variations --json`: of 100 episodes each; {variation: (group, successes)}."""

    def result(n):
        count = {"success_rate": n / 100, "successes": n, "episodes": 100}
        return count | {"interval": [n / 100 - 0.1, n / 100 + 0.1]}

    sampler = {"chunk_len": 5, "denoise_steps": 4}
    source = "defaults" if path.stem == "SFT" else "as trained"
    told = {"name": path.stem, "deterministic": True, "sampler": sampler, "sampler_source": source}
    protocol = {"env_id": "tabletop", "obs_mode": "rgb", "num_states": 100, "max_episode_steps": 40}
    protocol |= {"eval_protocol": "paper", "stochastic": False, "seeds": [0], "torch": "0"}
    variations = {
        env_id: {"group": group, "protocol": protocol, "results": [result(n)]}
        for env_id, (group, n) in successes.items()
    }
    groups = {group: [result(n)] for group, n in successes.values()}  # one variation in each
    mean = sum(n for _, n in successes.values()) // len(successes)
    report = {"results": [told | result(inside)], "protocol": protocol, "variations": variations}
    path.write_text(json.dumps(report | {"groups": groups | {"mean": [result(mean)]}}))


def test_variations_table(tmp_path, capsys, one_line_error):
    folder, page = tmp_path / "reports", tmp_path / "page.md"
    folder.mkdir()
    page.write_text("before\n\n<!-- variations -->\nold\n<!-- variations end -->\n\nafter\n")
    args = variations_table.Args(folder, page)
    assert "variations.sh" in one_line_error(variations_table.main, args)

    def write(name, inside, *counts):
        keys = ("lamp", "vision"), ("words", "semantics"), ("start", "execution")
        write_report(folder / f"{name}.json", inside, **{k: (g, n) for (k, g), n in zip(keys, counts)})

    write("SFT", 30, 12, 9, 18)
    write("tabletop__flow_sde_ppo__1__100", 1, 1, 1, 1)  # trained again since
    write("tabletop__flow_sde_ppo__1__101", 90, 40, 21, 62)
    write("tabletop__flow_sde_ppo__2__100", 80, 36, 25, 66)
    write("tabletop__flow_noise_ppo__1__100", 70, 33, 33, 33)
    variations_table.main(args)
    text = capsys.readouterr().out
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    table = {first.strip(): [cell.strip() for cell in others] for first, *others in lines}
    assert table["success"] == ["SFT", "Flow-SDE PPO", "Flow-Noise PPO"]
    assert table["lamp"] == ["12.0%", "38.0% (+26.0)", "33.0% (+21.0)"]  # means of both seeds
    # Student's t with one degree of freedom: 12.706 times the standard error, 2 points
    assert table["**vision**"] == [
        "12.0% [2.0%, 22.0%]",
        "**38.0% (+26.0)** [12.6%, 63.4%]",
        "**33.0% (+21.0)**",
    ]
    assert table["**in distribution**"][1].startswith("**85.0% (+55.0)**")
    assert "| **mean of the groups**" in text
    # by seed: vision gains 28, 24, semantics 12, 16, execution 44, 48; differences 16, 8 and 32, 32
    assert (
        "- Flow-SDE PPO, seeds 1, 2: in distribution +55.0 points, vision +26.0 (47%), semantics +14.0 "
        "(25%), execution +46.0 (84%). Vision minus semantics: +12.0 [-38.8, +62.8]. "
        "Execution minus semantics: +32.0 [+32.0, +32.0].\n"
    ) in text
    assert (
        "K = 4 (as trained), deterministic ODE (flow_sde_ppo seed 1, flow_sde_ppo seed 2, flow_noise_ppo s"
        in text
    )
    assert page.read_text().startswith("before\n\n<!-- variations -->\n\n| success")
    assert page.read_text().endswith("torch 0.\n\n<!-- variations end -->\n\nafter\n")
    before = page.read_text()
    variations_table.main(args)  # again: the same page
    assert page.read_text() == before and sorted(tmp_path.iterdir()) == [page, folder]
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        variations_table.main(args)
    assert page.read_text() == "no marks"


# --- solvers.py ---


def test_table_of_sft_and_rl(tmp_path, capsys, one_line_error):
    """By hand: a task's gain is over SFT, the mean's interval over the seeds, by Student's t."""
    args = rl_table.Args(tmp_path, tmp_path / "curves.png")
    assert "no reports" in one_line_error(rl_table.main, args)
    tasks = {
        "push": (20, {"sde": (40, 45, 35), "noise": (30,)}),
        "coffee-button": (10, {"sde": (30, 20, 25)}),
    }
    for task, (start, trained) in tasks.items():
        results = [{"checkpoint": f"sft/{task}", "successes": start, "episodes": 50}]
        for name, counts in trained.items():
            results += [
                {
                    "checkpoint": f"runs/flow_{name}_ppo/{task}-{seed}/x/checkpoint",
                    "successes": n,
                    "episodes": 50,
                }
                for seed, n in enumerate(counts, 1)
            ]
        told = [
            result | {"success_rate": result["successes"] / 50, "interval": [0.1, 0.5]} for result in results
        ]
        (tmp_path / f"{task}.json").write_text(json.dumps({"results": told}))
    rl_table.main(args)
    printed = capsys.readouterr().out.splitlines()
    header, _, easy, hard, mean, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed)
    assert header[3:] == ["Flow-SDE PPO: seeds, mean", "gain", "Flow-Noise PPO: seeds, mean", "gain"]
    assert easy[:3] == ["coffee-button", "easy", "20.0% [10%, 50%]"] and easy[4:] == ["+30.0", "not run", ""]
    # of 120 of 150: Wilson's interval
    assert hard[3:] == [
        "80% / 90% / 70%, **80.0%** [73%, 86%]",
        "+40.0",
        "60%, **60.0%** [46%, 72%]",
        "+20.0",
    ]
    # gains of the seeds: (40 + 40) / 2, (50 + 20) / 2, (30 + 30) / 2, so 35 +- 4.303 * 5 / sqrt(3)
    assert mean[2:5] == ["30.0%", "**65.0%**", "**+35.0** ± 12.4"] and mean[5:] == [
        "**60.0%** (of 1)",
        "**+20.0**",
    ]
    assert (tmp_path / "curves.png").stat().st_size > 10000


def test_exploration_of_two_steps():
    """K = 2: one noisy step but Euler's last. Of the variance that it leaves, sin^2 is new; q = 1 / 4."""
    S = abs(gaussian_end(2, 0.0, "euler", ())[0])
    for a in (0.3, 0.7, 1.0):
        for hybrid in (True, False):
            for solver, kept in (("cps", math.cos(a * math.pi / 2)), ("exponential", 0.25 ** (a**2 / 2))):
                e, std = solvers.exact(2, a, solver, hybrid, True)
                assert (e, std) == pytest.approx((S * math.sqrt(1 - kept**2), S), rel=1e-5)
    # Eq. 9 at tau = 0: mean (1 / 2 - a^2 / 2) x^0 + ..., std a; the ODE's second step multiplies both
    e, std = solvers.exact(2, 0.7, "euler", False, False)
    assert (e, std) == pytest.approx((2 * S * 0.7, 2 * S * math.hypot(0.5 - 0.245, 0.7)), rel=1e-5)


@pytest.mark.parametrize(
    "solver, last", [("euler", True), ("euler", False), ("cps", True), ("exponential", True)]
)
@pytest.mark.parametrize("hybrid", [True, False])
def test_exact_and_sampled_exploration_agree(solver, last, hybrid, monkeypatch):
    """On a mixture of one component, N(0.7, 0.3^2) in both dimensions."""
    monkeypatch.setattr(marginals, "WEIGHTS", torch.ones(1))
    monkeypatch.setattr(marginals, "MEANS", torch.full((1, 2), 0.7))
    monkeypatch.setattr(marginals, "STDS", torch.tensor([0.3]))
    e, std = solvers.exact(4, 0.7, solver, hybrid, last)
    assert solvers.sampled(4, 0.7, solver, hybrid, last, n=20_000) == pytest.approx(e, rel=0.02)
    x = marginals.sample(transition, 4, 0.7, solver, hybrid, n=20_000, last=last)
    assert x.std(dim=0).tolist() == pytest.approx([std, std], rel=0.03)


def test_nobody_explores_beyond_the_spread_and_keeps_the_distribution():
    """W2 >= e - S, and a sampler that ends no wider than the ODE has e <= S."""
    for K in (2, 4, 8, 40):
        S = abs(gaussian_end(K, 0.0, "euler", ())[0])
        for solver, hybrid, last in solvers.SAMPLERS.values():
            for a in (0.2, 0.5, 0.8, 1.0):
                e, std = solvers.exact(K, a, solver, hybrid, last)
                assert e <= std + 1e-12 and abs(std - S) >= e - S - 1e-12
                assert solver == "euler" or e <= S * (1 + 1e-5)


def test_level_is_found_or_there_is_none():
    for solver in ("euler", "exponential"):
        a = solvers.level_for(lambda a: solvers.exact(8, a, solver, False, True)[0], 0.1, solver)
        assert solvers.exact(8, a, solver, False, True)[0] == pytest.approx(0.1, rel=2e-3)
    assert solvers.level_for(lambda a: a / 2, 0.6, "cps") is None  # its greatest level is 1
    assert solvers.level_for(lambda a: a / 2, 0.6, "euler") == pytest.approx(1.2, abs=1e-3)


# --- gradient.py ---


def test_parts_of_the_gradient_are_the_policy_loss_s():
    """Summed over steps they are autograd's of Eq. 14 at ratio 1; without an action, of the others' sum."""
    torch.manual_seed(0)
    policy = load_policy("checkpoints/tabletop-sft")
    flags = flow_sde_ppo.Args(**HYBRID)
    policy.set_trained("expert", 1, 1)
    agent = flow_sde_ppo.Agent(policy, flags)
    obs, _ = make_envs("tabletop", 16, 0).reset()
    prefix, inputs = agent.encode(obs)
    batch = gradient.empty_batch(agent, prefix, inputs, 1, 16)
    batch.prefixes.put(0, prefix, inputs)
    batch.chain[0], batch.denoise_idx[0], batch.logprob[0], _ = agent.act(prefix, torch.Generator())
    batch.advantages = torch.randn(1, 16, 1)
    steps = torch.full((1, 16), 5)
    steps[0, :4] = 2
    found = gradient.gradients(agent, batch, steps).sum(dim=0)
    assert torch.allclose(found[0], credit.policy_gradient(agent, batch), rtol=1e-3, atol=1e-5)

    def whole(changed_chunk_len, rows):
        agent.chunk_len = changed_chunk_len
        logprob, _, _ = agent.evaluate_actions(prefix, batch.chain[0], batch.denoise_idx[0])
        advantages = batch.advantages[0]
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        ratio = (logprob - logprob.detach()).exp()
        loss = -(ratio * advantages)[rows].sum() / 16
        parts = torch.autograd.grad(-loss, policy.actor_parameters(), materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    assert torch.allclose(found[0], whole(5, slice(16)), rtol=1e-3, atol=1e-5)
    assert torch.allclose(found[1], whole(5, slice(4, 16)) + whole(2, slice(4)), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_signal_is_without_bias():
    """Batches of mean m and variance P: the mean of many estimates is |m|^2, also where that is small."""
    rng = torch.Generator().manual_seed(0)
    estimates = [
        gradient.signal_and_variance(0.1 + torch.randn(10, 50, generator=rng).double()) for _ in range(400)
    ]
    signals, errors, variances = np.array(estimates).T
    assert signals.mean() == pytest.approx(0.5, abs=0.15) and variances.mean() == pytest.approx(50, rel=0.02)
    assert signals.std() < errors.mean() < 1.5 * signals.std()  # on the safe side


@pytest.mark.slow
def test_credit_by_gamma_and_lambda(capsys):
    """Without a discount a success is worth as much in every chunk: the critic has less to explain."""
    small = dict(env_id="tabletop_press_button", num_envs=16, num_steps=8, batches=3, warmup=2)
    credit.main(credit.Args("checkpoints/tabletop-sft", pairs=("0.5,0.5", "1,1"), **small))
    out = capsys.readouterr().out
    rows = [
        [float(cell.split(" ±")[0]) for cell in row.strip("| ").split(" | ")] for row in out.splitlines()[2:4]
    ]
    assert [row[:2] for row in rows] == [[0.5, 0.5], [1, 1]] and rows[0][3] != rows[1][3]
    assert all(-1 < row[2] < 1 for row in rows) and "3 batches of 128 chunks" in out


@pytest.mark.parametrize("last", [False, True])
def test_drift_of_a_velocity_that_is_shifted(last, shift=0.3, a=0.5, K=4):
    """Eq. 9's mean moves with the velocity by delta (1 + a^2 / 2), in the first step by delta."""
    flags = flow_sde_ppo.Args(denoise_steps=K, noise_level=a, noisy_last_step=last)
    policies = [load_policy("checkpoints/tabletop-sft") for _ in range(2)]
    policies[1].action_out_proj.bias.data -= shift  # the sign is the checkpoints'
    agents = [flow_sde_ppo.Agent(policy, flags) for policy in policies]
    obs, _ = make_envs("tabletop", 3, 0).reset()
    prefixes = [agent.encode(obs)[0] for agent in agents]
    c = policies[0].config
    x0 = torch.randn((3, c.horizon, c.action_dim), generator=torch.Generator().manual_seed(1))
    moves, action, kl, _ = drift.compare(*agents, prefixes, x0)
    assert moves.tolist() == pytest.approx([(shift / K) ** 2] * K, rel=1e-3)
    tau = np.arange(K) / K
    std = a * np.sqrt((1 - tau) / np.maximum(tau, 1 / K) / K)
    mean = shift / K * np.where(tau > 0, 1 + a**2 / 2, 1)
    expected = (
        0.5 * 15 * (mean / std) ** 2 * (tau < (K if last else K - 1) / K)
    )  # five actions of three numbers
    assert kl.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    same = drift.compare(agents[0], agents[0], prefixes[:1] * 2, x0)
    assert action > 0 and not any(part.any() for part in same[:3])


def test_drift_of_a_run(tmp_path, capsys, one_line_error):
    """An episode that has ended counts no more; a run without the SDE's noise is refused."""
    shutil.copytree("checkpoints/tabletop-sft", tmp_path / "checkpoint")
    args = drift.Args("checkpoints/tabletop-sft", str(tmp_path / "checkpoint"), num_envs=16)
    (tmp_path / "args.json").write_text(json.dumps(asdict(flow_sde_ppo.Args())))
    drift.main(args)
    told = capsys.readouterr().out
    assert "| 3 | no | 0.000 | not seen |" in told and "moves by 0.000" in told
    assert 16 * 3 < int(re.search(r"(\d+) chunks", told)[1]) < 16 * 8  # at most 40 steps, some succeed
    (tmp_path / "args.json").write_text(json.dumps({"noise": "learned"}))
    assert "SDE's noise" in one_line_error(drift.main, args)


# --- schedules.py and full_size.py ---

TINY_SCHEDULES = schedules.Args(size="tiny", rounds=1, epochs=(2,), num_envs=4, micro_batch_size=2)


def table_of(text):
    """The rows of the last table of a text in Markdown, cell by cell, without the line under the titles."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[max(i for i, row in enumerate(rows) if row[-1].startswith(("kept", "peak", "computed"))) :]


@pytest.mark.slow
def test_savings_change_nothing_but_the_work(capsys):
    """The run itself compares chains and losses; a saving leaves FLOPs out, and says how many are left."""
    schedules.compare(TINY_SCHEDULES, "expert")
    out = capsys.readouterr().out
    titles, *rows = table_of(out)
    flops = [float(row[titles.index("GFLOP of an epoch, a chunk")]) for row in rows]
    assert len(flops) == 6 and flops == sorted(flops, reverse=True) and len(set(flops)) == 6
    assert float(re.search("at most (.*) of their size", out)[1]) < 1e-4


@pytest.mark.slow
def test_schedules_that_differ_are_found(monkeypatch, capsys):
    """What the added passes of the expert or a camera that is seen after all would do to the losses."""
    with monkeypatch.context() as patch:
        pad = torch.nn.functional.pad  # a mask is filled with True
        filled = lambda x, widths, value=0: pad(x, widths, value=value or x.dtype == torch.bool)  # noqa: E731
        patch.setattr(torch.nn.functional, "pad", filled)
        with pytest.raises(SystemExit):
            schedules.compare(TINY_SCHEDULES, "vlm")
    again = schedules.ScheduledAgent.features_again
    monkeypatch.setattr(schedules.ScheduledAgent, "features_again", lambda *x: again(*x).flip(1) * 1.1)
    with pytest.raises(SystemExit):
        schedules.compare(TINY_SCHEDULES, "expert")
    assert capsys.readouterr().err.count("not the same computation") == 2


def test_flops_are_those_of_the_products():
    """Attention among them: two products, of queries and keys and of what they give and values."""
    q, k = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 5, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert schedules.count_flops(lambda: attend(q, k, k)) == 2 * 2 * (2 * 3 * 5 * 8)
    assert schedules.count_flops(lambda: torch.randn(4, 8) @ torch.randn(8, 16)) == 2 * 4 * 8 * 16


@pytest.mark.slow
def test_flops_of_pi0():
    """Counted on networks, and here from sizes: tokens x parameters, queries x keys, twice each."""
    see, step, learn = schedules.costs(schedules.PiConfig())
    vision = 512 * (27 * (4 * 1152**2 + 2 * 1152 * 4304) + 3 * 14**2 * 1152 + 1152 * 2048)
    vision += 2 * 27 * 2 * 256**2 * 1152
    layer = 526 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 16384) + 2 * 526**2 * 2048
    last = 526 * 2 * 2048 * 256  # its keys and values
    assert see == pytest.approx(2 * (vision + 17 * layer + last), rel=1e-3)
    layer = 51 * (2 * 1024 * 2048 + 2 * 1024 * 256 + 3 * 1024 * 4096) + 2 * 51 * 577 * 2048
    assert step == pytest.approx(2 * (18 * layer + 50 * (3 * 1024**2 + 2 * 32 * 1024)), rel=1e-3)
    assert 2.5 * step < learn <= 3 * step
    scaled = schedules.costs(schedules.SCALED)
    assert scaled[0] / scaled[1] == pytest.approx(see / step, rel=0.05)


WITHOUT = """
import runpy, sys
for name in ("gymnasium", "gymnasium.vector.utils", "matplotlib", "matplotlib.figure", "tensorboard",
             "torch.utils.tensorboard", "PIL", "mujoco"):
    sys.modules[name] = None
flags = "--size tiny --report speed --rounds 1 --batches 1 --chunks 4 --micro-batches 2"
sys.argv = ["schedules.py", *flags.split()]
sys.path.insert(0, "benchmark")
runpy.run_path("benchmark/schedules.py", run_name="__main__")
"""


@pytest.mark.slow
def test_speed_needs_no_gymnasium():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(table_of(done.stdout)[1][1]) > 0  # chunks per second of an update


@pytest.mark.slow
@pytest.mark.parametrize("model, script", [("pi05", "flow_noise_ppo"), ("gr00t", "flow_sde_grpo")])
def test_full_size_runs_at_tiny_size(model, script):
    command = [
        sys.executable,
        "benchmark/full_size.py",
        "--size",
        "tiny",
        "--model",
        model,
        "--script",
        script,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, row = table_of(done.stdout)
    assert row[:2] == [model, script] and all(cell.endswith(" s") for cell in row[2:5])
    gradient = float(re.search(r"gradient (\S+);", done.stdout)[1])
    assert (gradient > 0) == (script != "flow_sde_grpo")  # which has nothing to compare: both episodes fail


def test_random_policy_has_the_dtypes_of_a_public_one():
    policy = full_size.random_policy(full_size.TINY["pi0"])
    found = {parameter.dtype: parameter.requires_grad for parameter in policy.parameters()}
    assert found == {torch.bfloat16: False, torch.float32: True}
    names = {name for name, _ in load_policy("tiny").named_parameters() if not name.startswith("value_head")}
    assert {name for name, _ in policy.named_parameters()} == names


def test_products_in_fp32_are_nearer_to_the_truth():
    """And of the dtype that they would have had, gradients too."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 300).bfloat16(), torch.randn(5, 300).bfloat16().requires_grad_()
    with full_size.Fp32Products():
        found = torch.nn.functional.linear(x, weight)
        found.sum().backward()
    truth = x.double() @ weight.double().t()
    assert found.dtype == weight.grad.dtype == torch.bfloat16
    assert ((found - truth).abs() <= 2**-8 * truth.abs()).all()  # rounded once
    assert torch.allclose(weight.grad.double(), x.double().sum(0).expand(5, -1), rtol=2**-7)
