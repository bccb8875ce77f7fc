"""What it saves to do nothing twice: the authors' schedule against this project's, one saving after another.

With a frozen VLM an observation's keys and values are the same in all epochs. The authors' schedule computes
them again for every micro-batch of every epoch, with a third camera that LIBERO has not and prompts padded to
48 tokens, and V_expert of Eq. 16 with K more passes of the expert. Here both run in one process, on the same
weights and chunks, through flow_sde_ppo.py's own rollout and update; what it does not do is added here. It is
their order of work, not their code: kernels and dtypes are the same on both sides.

That chains, values and losses are equal is checked in the run. So that they can be, the learning rate is
1e-12. Seconds on a CPU are of the process, all threads together, so that other work on the machine counts
little. Environments take no time here.

    python benchmark/schedules.py                               # scaled pi0, one thread; prints Markdown
    python benchmark/schedules.py --size tiny --num-envs 64 --micro-batch-size 64
    python benchmark/schedules.py --size full --device cuda     # also --report speed, see gpu.sh
    python benchmark/schedules.py --report cost                 # by arithmetic, seconds
"""

import copy
import functools
import importlib
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
for library in ("gymnasium", "gymnasium.vector.utils", "matplotlib.figure", "torch.utils.tensorboard"):
    try:  # the scripts import them, nothing here uses them, and a machine with a GPU may lack them
        importlib.import_module(library)
    except ImportError:
        sys.modules[library] = MagicMock()

import full_size  # noqa: E402
import memory  # noqa: E402

import pi_models  # noqa: E402
from flags import fail, paper_row  # noqa: E402
from flow_sde_ppo import Agent, compute_advantages, now, rollout, update  # noqa: E402
from flow_sde_ppo import Args as Flags  # noqa: E402
from pi_models import PiConfig, Prefixes  # noqa: E402

# pi0 with an eighth of its widths, two ninths of its depth, and 32 instead of 2048 numbers in all heads of a
# layer: so an observation costs as many denoise steps as in pi0, which the run prints. Pictures of 224
# pixels, 256 tokens each, and 50 actions are pi0's own
SCALED = PiConfig(
    vision_width=144, vision_mlp=538, vision_depth=6, vision_heads=4, width=256, mlp=2048, depth=4, heads=2,
    head_dim=16, vocab_size=229, expert_width=128, expert_mlp=512, tokenizer="words",
)  # fmt: skip  # sizes in rows
PADDED = 48  # tokens of a prompt
PROMPTS = "put the bowl on the plate", "open the drawer of the cabinet and put the bowl in it"  # 8, 14 tokens
ROBOT = 8, 7  # LIBERO's numbers of state and of action
COMPARED = "losses/policy_loss", "losses/value_loss", "losses/approx_kl", "losses/entropy", "flow/grad_norm"
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # FLOP/s in bf16, of data sheets


@dataclass
class Args:
    report: Literal["schedules", "speed", "cost"] = "schedules"
    """schedules: the comparison; speed: milliseconds and memory of ours alone; cost: FLOPs, by arithmetic"""
    size: Literal["tiny", "scaled", "full"] = "scaled"
    model: Literal["pi0", "pi05"] = "pi0"
    """of full size and of the tiny one"""
    critics: tuple[Literal["vlm", "expert"], ...] = ("vlm", "expert")
    epochs: tuple[int, ...] = (1, 4)
    """update epochs"""
    num_envs: int = 8
    num_steps: int = 2
    """chunks per environment; all of an iteration are one minibatch"""
    micro_batch_size: int = 16
    batches: tuple[int, ...] = (1, 64)
    """observations at once, in the report on speed"""
    chunks: int = 64
    """of an update there"""
    micro_batches: tuple[int, ...] = (8, 16, 32)
    """of an update there"""
    rounds: int = 3
    """of every measurement; medians are printed"""
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 1
    """CPU threads of torch"""


@dataclass
class Schedule:
    """The authors' schedule; each of the following leaves something out."""

    cameras: int = 3
    padded: bool = True
    last_layer: bool = True  # the VLM's last layer to its end, also where only its keys and values are read
    prefix_again: bool = True  # for each micro-batch of the update
    features_again: bool = True  # K passes of the expert for V_expert


def schedules(critic):
    """{what is left out: the schedule}, each with what is before it."""
    steps = {"the authors' schedule": Schedule()}

    def without(name, **changed):
        steps[name] = replace([*steps.values()][-1], **changed)

    without("without the masked camera", cameras=2)
    without("and prompts as long as they are", padded=False)
    if critic == "expert":  # V_vlm reads the output
        without("and the VLM up to its last keys and values", last_layer=False)
        without("and V_expert's features kept", features_again=False)
    without("and the prefix kept: ours", prefix_again=False, features_again=False)
    return steps


class ScheduledAgent(Agent):
    """flow_sde_ppo's, which can do more than is needed."""

    def __init__(self, policy, flags, schedule):
        policy = copy.copy(policy)  # the same weights
        policy.encode = functools.partial(policy.encode, pool=schedule.last_layer)
        super().__init__(policy, flags)
        self.schedule = schedule

    @torch.no_grad()
    def encode(self, obs):
        inputs = self.policy.preprocess(obs)  # drops a camera that nobody has
        missing = self.schedule.cameras - inputs["images"].shape[1]
        inputs["images"] = F.pad(inputs["images"], (0, 0, 0, 0, 0, 0, 0, missing), value=-1.0)
        inputs["image_mask"] = F.pad(inputs["image_mask"], (0, missing), value=False)
        if self.schedule.padded:
            for name in ("tokens", "token_mask"):
                inputs[name] = F.pad(inputs[name], (0, PADDED - inputs[name].shape[1]), value=0)
        return self.policy.encode(inputs), inputs

    def evaluate_actions(self, prefix, chain, denoise_idx):
        self.chain = chain
        return super().evaluate_actions(prefix, chain, denoise_idx)

    def value(self, prefix, features=None, generator=None):
        in_update = torch.is_grad_enabled()
        if in_update and self.schedule.features_again and self.policy.config.critic == "expert":
            features = self.features_again(prefix)
        return super().value(prefix, features, generator)

    @torch.no_grad()
    def features_again(self, prefix):
        """What `act` saw of the chunks that are being updated on, (B, K, W)."""
        seen = []
        for k in range(self.K):
            tau = torch.full((len(self.chain),), k / self.K, device=self.chain.device)
            _, features = self.policy.velocity(prefix, self.chain[:, k], tau)
            seen.append(features.mean(dim=1))
        return torch.stack(seen, dim=1)


class Pictures:
    """Stands in for LIBERO's environments: other pictures and states after each chunk, rewards, no time."""

    def __init__(self, config, num_envs, num_steps):
        rng, self.t = np.random.default_rng(0), 0
        side = 256 if config.image_size == 224 else config.image_size  # LIBERO's, or as they are needed
        shape, prompts = (num_envs, 2, side, side, 3), np.resize(PROMPTS, num_envs).tolist()

        def draw():
            state = rng.normal(size=(num_envs, ROBOT[0])).astype(np.float32)
            return {"images": rng.integers(0, 256, shape, np.uint8), "state": state, "prompt": prompts}

        self.obs = [draw() for _ in range(num_steps + 1)]
        self.rewards = rng.integers(0, 2, (num_steps, num_envs, 1)).astype(np.float32)

    def step_chunk(self, actions):
        self.t += 1
        never, N = np.zeros(len(actions), bool), len(actions)
        info = {name: np.zeros(N) for name in ("success", "episode_return", "episode_length")}
        info |= {"alive": ~never, "dropped": never, "steps": np.full(N, actions.shape[1])}
        return self.obs[self.t], self.rewards[self.t - 1], never, never, info


def build(args, critic):
    """Weights and flags that all schedules share."""
    if args.size == "scaled":
        config = SCALED
    else:
        config = {"tiny": full_size.TINY, "full": full_size.CONFIGS}[args.size][args.model]
    vlm_dtype = torch.bfloat16 if args.size == "full" else torch.float32
    policy = full_size.random_policy(config, args.device, vlm_dtype)
    policy.fit_robot(*ROBOT)
    policy.fit_prompts(PROMPTS)
    policy.need_value_head(critic, 4)
    torch.nn.init.normal_(policy.value_head.mlp[-1].weight, std=0.1)  # a new one is zero
    flags = Flags(num_envs=args.num_envs, num_steps=args.num_steps, micro_batch_size=args.micro_batch_size)
    paper = {"mdp": "hybrid", "noisy_last_step": True, "noise_level": 0.5, "num_minibatches": 1}
    groups = policy.actor_parameters(), policy.value_head.parameters()
    optimizer = torch.optim.AdamW([{"params": group, "lr": 1e-12} for group in groups])
    return policy, replace(flags, critic=critic, max_grad_norm=math.inf, **paper), optimizer


def storage(agent, prefix, inputs, flags):
    """What flow_sde_ppo.py's `main` makes for a rollout."""
    c, device = agent.policy.config, agent.policy.device
    room = (0, 0) if agent.schedule.prefix_again else (None, None)

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros((flags.num_steps, flags.num_envs, *shape), dtype=dtype, device=device)

    return SimpleNamespace(
        prefixes=Prefixes(agent.policy, flags.num_steps, flags.num_envs, prefix, inputs, *room),
        chain=zeros(flags.denoise_steps + 1, c.horizon, c.action_dim),
        denoise_idx=zeros(1, dtype=torch.long),
        logprob=zeros(1),
        value=zeros(1),
        features=zeros(flags.denoise_steps, c.expert_width),
        reward=zeros(),
        final_value=zeros(),
        **{name: zeros(dtype=torch.bool) for name in ("terminated", "truncated")},
        alive=zeros(dtype=torch.bool) | True,
    )


class Side:
    """One schedule, with its agent and its chunks."""

    def __init__(self, policy, flags, schedule, optimizer):
        self.flags, self.optimizer = flags, optimizer
        self.agent = ScheduledAgent(policy, flags, schedule)
        self.envs = Pictures(policy.config, flags.num_envs, flags.num_steps)
        self.first = self.envs.obs[0], *self.agent.encode(self.envs.obs[0])
        self.batch = storage(self.agent, *self.first[1:], flags)

    def random(self, seed):
        return torch.Generator(self.agent.policy.device).manual_seed(seed)

    def rollout(self):
        self.envs.t = 0
        rollout(self.agent, self.envs, self.first, self.batch, self.random(0))
        return {"chain": self.batch.chain, "value": self.batch.value, "logprob": self.batch.logprob}

    def update(self, epochs):
        flags = replace(self.flags, update_epochs=epochs)
        metrics = update(self.agent, self.optimizer, self.batch, flags, self.random(1))
        return {name: metrics[name] for name in COMPARED}

    def use_chunks(self, batch):
        """Those of another side, but for what the VLM read or gave."""
        self.batch = SimpleNamespace(**{**vars(batch), "prefixes": self.batch.prefixes})


def finish(batch, flags, generator):
    """Advantages, and old log-probabilities that are not quite those of the policy."""
    given = batch.reward, batch.value, batch.next_value, batch.terminated, batch.truncated
    given += batch.final_value, flags.gamma, flags.gae_lambda
    batch.advantages, batch.returns = compute_advantages(*given)
    noise = torch.randn(batch.logprob.shape, generator=generator, device=batch.logprob.device)
    batch.logprob += 0.2 * noise


def difference(expected, found):
    """The largest of some tensors or numbers, each relative to the largest number in it."""
    pairs = ((torch.as_tensor(x).double(), torch.as_tensor(found[name])) for name, x in expected.items())
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def clock(device):
    """Seconds: on a CPU of the process, which other processes do not lengthen much."""
    return now(device) if device.type == "cuda" else time.process_time()


def measure(sides, rounds, work):
    """{name: seconds of `work(side)` in each round}, and the largest difference from the first side."""
    seconds, worst = {name: [] for name in sides}, 0.0
    for _ in range(rounds):
        expected = None
        for name, side in sides.items():
            began = clock(side.agent.policy.device)
            found = work(side)
            seconds[name].append(clock(side.agent.policy.device) - began)
            found = {key: torch.as_tensor(x).clone() for key, x in found.items()}
            expected = expected or found
            worst = max(worst, difference(expected, found))
    return seconds, worst


def count_flops(work):
    """Of matrix products, attention among them: in plain ones, as a CPU's own attention is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def costs(config, cameras=2, tokens=14, to_the_end=False):
    """FLOPs of an observation in the VLM, of a denoise step, of a step with its gradients; without data."""
    with FakeTensorMode(), no_init_weights():
        policy = pi_models.Policy(config)
        size = config.image_size
        inputs = {
            "images": torch.empty(1, cameras, 3, size, size),
            "image_mask": torch.ones(1, cameras, dtype=torch.bool),
            "tokens": torch.zeros(1, tokens, dtype=torch.long),
            "token_mask": torch.ones(1, tokens, dtype=torch.bool),
            "state": torch.empty(1, config.state_dim),
        }
        prefix = policy.encode(inputs)
        x, tau = torch.empty(1, config.horizon, config.action_dim), torch.empty(1)
        return (
            count_flops(lambda: policy.encode(inputs, pool=to_the_end)),
            count_flops(lambda: policy.velocity(prefix, x, tau)),
            count_flops(lambda: policy.velocity(prefix, x, tau)[0].sum().backward()),
        )


def cost():
    """What an iteration of the paper's batch costs by arithmetic, by our schedule and by the authors'."""
    columns = {}
    for model in ("pi0", "pi05"):
        config, row = full_size.CONFIGS[model], paper_row("libero_spatial", model)
        chunks, epochs, K = row["num_envs"] * row["num_steps"], row["update_epochs"], row["denoise_steps"]
        expert = row["critic"] == "expert"
        see, step, learn = costs(config, to_the_end=not expert)
        columns[f"{model}, ours"] = chunks, epochs, see, K * step, learn
        see, step, learn = costs(config, 3, config.max_token_len, True)
        again = see + K * step * expert
        columns[f"{model}, authors' schedule"] = chunks, epochs, see, K * step, again + learn
    rows = {name: [] for name in ("an observation", "denoising a chunk", "a chunk of an epoch of the update")}
    for chunks, epochs, *parts in columns.values():
        for cells, flops in zip(rows.values(), parts):
            cells.append(f"{flops / 1e12:.3g}")
        total = chunks * (parts[0] + parts[1] + epochs * parts[2])
        rows.setdefault("**an iteration**, chunks x epochs", []).append(f"{chunks:,} x {epochs}")
        rows.setdefault("**an iteration**", []).append(f"{total / 1e12:,.0f}")
        for gpus in (1, 8):
            seconds = total / (0.4 * PEAKS["H100"]) / gpus
            rows.setdefault(f"seconds on {gpus} H100 at 40 % of the peak", []).append(f"{seconds:.0f}")
    print(f"| TFLOP | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def compare(args, critic):
    """Prints the table of one critic, and returns {schedule: {column: times faster than the first}}."""
    policy, flags, optimizer = build(args, critic)
    sides = {name: Side(policy, flags, schedule, optimizer) for name, schedule in schedules(critic).items()}
    first, *others = sides.values()
    seconds = {}
    seconds["rollout"], worst = measure(sides, args.rounds, Side.rollout)
    finish(first.batch, flags, first.random(2))
    for other in others:
        other.use_chunks(first.batch)
    for epochs in args.epochs:
        column = f"update, {epochs} epoch{'s' * (epochs > 1)}"
        seconds[column], error = measure(sides, args.rounds, lambda side: side.update(epochs))
        worst = max(worst, error)
        whole = {name: np.add(seconds["rollout"][name], seconds[column][name]) for name in sides}
        seconds[column.replace("update", "iteration")] = whole
    if args.size != "full" and not worst < 1e-3:  # bf16 is rounded otherwise where sums have other terms
        fail(f"chains or losses differ by {worst:.1e}: these are not the same computation", code=1)

    chunks = flags.num_envs * flags.num_steps
    titles = [f"V_{critic}: ms a chunk", *seconds, "GFLOP of an epoch, a chunk", "kept, MiB a chunk"]
    titles += ["peak, GiB"] * (args.device == "cuda")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    ratios = {}
    for name, side in sides.items():
        cells, ratios[name] = [], {}
        for column, of in seconds.items():
            baseline = next(iter(of.values()))
            ratios[name][column] = np.median(np.divide(baseline, of[name]))  # neighbours in time
            milliseconds = 1e3 * np.median(of[name]) / chunks
            cells.append(f"{milliseconds:,.1f} ({ratios[name][column]:.2f}x)")
        flops = count_flops(lambda: side.update(1)) / chunks
        fields = [field for _, _, fields in side.batch.prefixes.parts for field in fields.values()]
        kept = memory.size(fields) / chunks / 2**20
        cells += [f"{flops / 1e9:.3g}", f"{kept:.2f}"] + [peak(side)] * (args.device == "cuda")
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        f"\nChains, values, losses and gradient norms differ by at most {worst:.0e} of their size. Medians "
        f"of {args.rounds} round(s) of {chunks} chunks, micro-batches of {args.micro_batch_size}, "
        f"K = {flags.denoise_steps}."
    )
    return ratios


def peak(side):
    """GiB of the process in an update, on a GPU."""
    if side.agent.policy.device.type != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    side.update(1)
    return f"{torch.cuda.max_memory_allocated() / full_size.GIB:.1f}"


def seconds_of(args, work):
    """Median over the rounds, after one that warms up."""
    device, taken = torch.device(args.device), []
    for _ in range(1 + args.rounds):
        began = clock(device)
        work()
        taken.append(clock(device) - began)
    return np.median(taken[1:])


def speed(args):
    """Ours alone: encoding and denoising of small and large batches, updates with several micro-batches."""
    policy, flags, optimizer = build(args, "expert")
    agent, generator = Agent(policy, flags), torch.Generator(policy.device)
    print("| batch | encode, ms an observation | TFLOP/s | of the peak | denoise, ms a chunk |")
    print("|---|---|---|---|---|")
    for n in args.batches:
        inputs = policy.preprocess(Pictures(policy.config, n, 0).obs[0])
        prefix = policy.encode(inputs)
        encode = seconds_of(args, lambda: policy.encode(inputs))
        denoise = seconds_of(args, lambda: agent.act(prefix, generator))
        rate, share = count_flops(lambda: policy.encode(inputs)) / encode, "not known"
        if args.device == "cuda":
            peaks = [top for name, top in PEAKS.items() if name in torch.cuda.get_device_name()]
            share = f"{rate / peaks[0]:.0%}" if peaks else share
        print(f"| {n} | {1e3 * encode / n:.3g} | {rate / 1e12:.3g} | {share} | {1e3 * denoise / n:.3g} |")
    print("\n| micro-batch | update, chunks/s | peak, GiB |\n|---|---|---|")
    flags = replace(flags, num_envs=args.chunks, num_steps=1)
    side = Side(policy, flags, Schedule(2, False, False, False, False), optimizer)
    side.rollout()
    finish(side.batch, flags, side.random(2))
    for n in args.micro_batches:
        side.flags = replace(flags, micro_batch_size=n)
        taken = seconds_of(args, lambda: side.update(1))
        print(f"| {n} | {args.chunks / taken:.3g} | {peak(side)} |")


def main(args):
    torch.set_num_threads(args.num_threads)
    if args.report == "cost":
        return cost()
    with full_size.products(args.device):
        if args.report == "speed":
            speed(args)
        else:
            for critic in args.critics:
                compare(args, critic)
    if args.size == "scaled":
        (see, step, _), (full_see, full_step, _) = costs(SCALED), costs(PiConfig())
        print(f"An observation costs {see / step:.0f} denoise steps, in pi0 {full_see / full_step:.0f}.")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"\n{args.model if args.size == 'full' else args.size}, {device}, {args.num_threads} thread(s) of "
        f"{os.cpu_count()} cores, torch {torch.__version__}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
