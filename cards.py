"""The model card of a policy, README.md in its folder, and the way to the Hugging Face hub.

    python evaluate.py --checkpoints runs/<run>/checkpoint --card    # or --upload OWNER/NAME, which does both

A card says what evaluate.py has just measured and how the policy was trained, with the curve of its run and a
GIF of some episodes beside it. What README.md said before, such as how the policy was made, stays at its end.
"""

import dataclasses
import json
import os
import re
import shlex
from glob import escape
from importlib.util import find_spec
from pathlib import Path

from flags import as_words, fail, launcher
from layouts import CARD, is_read

CURVE, GIF = CARD
ID = r"\w[\w.-]*/\w[\w.-]*"  # of the hub
NAMES = {"pi0": "pi0", "pi05": "pi0.5", "gr00t": "GR00T N1.5"}
ALGORITHMS = {  # a flag that tells it from those below it: its name and script
    "group_size": ("Flow-SDE GRPO", "flow_sde_grpo.py"),
    "logprob_reduction": ("Flow-Noise PPO", "flow_noise_ppo.py"),
    "gae_lambda": ("Flow-SDE PPO", "flow_sde_ppo.py"),
}
BLOCK = "```bash\n{}\n```"
BEFORE = "<!-- what README.md said before -->"


def check(args):
    """The user's mistakes, before an episode is played. Returns the path of the card."""
    folder, name = args.checkpoints[0], args.upload
    for wrong, message in [
        (len(args.checkpoints) > 1, "--card is of one policy: give one of --checkpoints"),
        (not os.path.isdir(folder), f"--card is written into the policy's folder, and {folder} is none"),
        (name and not re.fullmatch(ID, name), f"--upload {name} must be OWNER/NAME"),
        (name and not find_spec("huggingface_hub"), "--upload needs the hub: pip install huggingface_hub"),
    ]:
        if wrong:
            fail(message)
    if name:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            fail(f"--upload {name}: HF_HUB_OFFLINE forbids it")
        if not get_token():
            fail(f"--upload {name}: there is no token; `hf auth login` stores one, or set HF_TOKEN")
    return os.path.join(folder, "README.md")


def write(args, policy, sampler, table, gif):
    """README.md, the curve and the GIF, each there whole or not at all; the hub last."""
    folder = Path(args.checkpoints[0])
    readme, curve, told = folder / "README.md", folder.resolve().parent / CURVE, folder / "args.json"
    try:
        told = dict(json.loads(told.read_text())) if told.is_file() else {}  # evaluate.py has read it, too
        if curve.is_file():
            put(folder / CURVE, curve.read_bytes())
        if os.path.abspath(gif) != os.path.abspath(folder / GIF):
            put(folder / GIF, Path(gif).read_bytes())
        before = readme.read_text() if readme.is_file() else ""
        put(readme, compose(args, policy, sampler, table, told, folder, before).encode())
    except (OSError, ValueError) as error:  # also a README.md that is no text
        fail(f"--card: {readme} cannot be written ({error}); it is as it was", code=1)
    print(f"card: {readme}")
    if args.upload:
        upload(folder, args.upload)


def put(path, content):
    temporary = f"{path}.tmp"
    try:
        Path(temporary).write_bytes(content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def compose(args, policy, sampler, table, told, folder, before):
    """The text of the card, from what is known of the policy; `told` are the flags it was trained with."""
    kind, run = NAMES[policy.config.variant], folder.resolve().parent
    tiny = policy.config.tokenizer in ("words", "bytes")  # has grown from ours, the others from a base model
    header = {"license": "mit" if tiny else "other", "library_name": "pytorch", "pipeline_tag": "robotics"}
    header["tags"] = ["pirl", "vision-language-action", "flow-matching", kind.lower(), args.env_id]
    title, before = earlier(before)
    about = f"A {'tiny ' if tiny else ''}{kind}, {sum(p.numel() for p in policy.parameters()):,} parameters"
    again = BLOCK.format(shlex.join(["python", "evaluate.py", *evaluation(args, sampler)]))
    parts = [f"![episodes of the evaluation]({GIF})", "## Evaluation", table, again]
    ran = {"env_id", "checkpoint"} <= told.keys()
    trained_by = [names for flag, names in ALGORITHMS.items() if ran and flag in told]
    if trained_by:
        algorithm, script = trained_by[0]
        header["tags"].append("reinforcement-learning")
        about += f", trained by {algorithm} on `{told['env_id']}`, seed {told.get('seed')}, from "
        about += f"`{told['checkpoint']}`: online RL after [piRL](https://arxiv.org/abs/2510.25889)"
        if base := downloaded(str(told["checkpoint"])):
            header["base_model"] = base
        ranks = [path.name.split("of")[-1].split(".")[0] for path in run.glob("resume/*.rank0of*")]
        curve = [f"![success in training, and by the ODE]({CURVE})"] if (folder / CURVE).is_file() else []
        words = [*launcher(ranks[0] if ranks else "1"), script, *as_words(told)]
        parts += ["## Training", *curve, BLOCK.format(shlex.join(words))]
    parts += ["## Licence", "MIT, as the code's." if tiny else "The base model's licence applies."]
    parts += ["## How it was made", BEFORE, before] if before else []
    header = "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"])
    return "\n\n".join([f"{header}\n# {title or folder.resolve().name}", f"{about}.", *parts]) + "\n"


def earlier(text):
    """Title and text of a README.md that is there already, without what a card has written before it."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    text = text.split(BEFORE)[-1] if BEFORE in text else re.sub(r"\A---\n(.*\n)*?---\n", "", text)
    return title and title[1], re.sub(r"\A\s*# .+", "", text).strip()


def downloaded(checkpoint):
    """Its name if it is a repository of the hub that this machine has; a path can look the same."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = checkpoint.partition("@")[0]
    return Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir() and name


def evaluation(args, sampler):
    """The words that evaluate the policy again, from where it can be had, whatever the defaults are then."""
    mine = {"checkpoints", "labels", "json", "capture_video", "device", "num_threads", "card", "upload"}
    mine |= set() if args.stochastic else vars(sampler).keys() - {"chunk_len", "denoise_steps"}
    args = dataclasses.replace(args, **vars(sampler))
    fields = [field for field in dataclasses.fields(args) if field.name not in mine]
    told = {f.name: getattr(args, f.name) for f in fields if getattr(args, f.name) != f.default}
    return ["--checkpoints", args.upload or args.checkpoints[0], *as_words(told)]


def upload(folder, name):
    """The files that are known here, in one commit."""
    import huggingface_hub as hub

    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [escape(name) for name in names if is_read(name) or name in {"README.md", *CARD}]
    try:
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=names, commit_message="policy and card"
        )
    except Exception as error:  # whatever went wrong on the way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"the card is written, but not uploaded ({reason}); try `hf upload {name} {folder}`", code=1)
    print(f"uploaded: {hub.HfApi().endpoint}/{name}")
