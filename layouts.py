"""Folders of checkpoints: what each public layout calls a tensor, reading them safely, saving.

What lies in a folder was written by others, was downloaded, or was cut off. Nothing in it is run (of a .pt
only tensors are unpickled), and nothing broken gets in: files that end too early, tensors that hold NaN,
statistics that cannot normalise, sizes that cannot be are refused in one line. A flipped bit that leaves a
usual number cannot be seen.

    tensors = read_tensors(folder)       # under their own names; `our_key` renames those of pi0 and pi0.5
    stats = read_stats(folder, tensors)  # of state and actions
    save_policy(policy, folder)          # openpi's layout; a kill at any moment leaves the old or the new one

What NVIDIA calls GR00T's tensors stands in gr00t_models.py.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from glob import escape
from pathlib import Path
from pickle import PickleError

import torch
import torch.nn as nn

from flags import fail

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
STATISTICS = {"pi0": ("mean", "std"), "pi05": ("q01", "q99"), "gr00t": ("min", "max")}  # that normalise
TOKENIZERS = {"paligemma": "google/paligemma-3b-pt-224", "qwen3": "Qwen/Qwen3-1.7B", "words": "tiny"}

# ------------------------------------------------------------------------------------------------------ names

# ours -> openpi's, the layout that most tools read. The word embedding is stored as the tied lm_head.
OPENPI = {
    "vision_tower.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "multi_modal_projector.": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.",
    "language_model.embed_tokens.": "paligemma_with_expert.paligemma.lm_head.",
    "language_model.": "paligemma_with_expert.paligemma.model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}

# anyone's -> ours, one rule after the other: openpi, RLinf, lerobot (hub, trained, old), transformers
RENAMED = [
    (r"\b(_orig_mod|module)\.", ""),  # torch.compile's and DDP's
    (r"^model\.(?!vlm\.|dit\.)", ""),
    (r"^(paligemma_with_expert\.)?paligemma\.(model\.)?|^model\.vlm\.", ""),
    (r"^(paligemma_with_expert\.)?gemma_expert\.(model\.)?|^model\.dit\.", "expert."),
    (r"^embed_action_time\.", ""),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^multi_modal_projector\.linear\.", "multi_modal_projector."),
    (r"^language_model\.model\.", "language_model."),
    (r"^(language_model\.)?lm_head\.", "language_model.embed_tokens."),  # tied: one is stored, or both
    (r"^noise_head\.mlp_logvar\.moduleList\.(\d)\.linear_1\.", lambda m: f"noise_head.mlp.{2 * int(m[1])}."),
]
UNUSED = r"^expert\.(lm_head|embed_tokens)\.|^(un)?normalize_|logvar_(min|max)$"  # by the networks
NEITHER, STATS = "neither a pi0 nor a pi0.5", "norm_stats.json"
WEIGHTS = "full_weights.pt", "model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt"


def their_key(key):
    prefix = next((p for p in OPENPI if key.startswith(p)), "")
    return OPENPI.get(prefix, "") + key[len(prefix) :]


def our_key(key):
    for pattern, ours in RENAMED:
        key = re.sub(pattern, ours, key)
    return key


# ---------------------------------------------------------------------------------------------------- reading


def read_json(file):
    """The object that a JSON file holds."""
    try:
        told = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a {file.name} that cannot be read: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"has a {file.name} that cannot be read: it is no object")
    return told


def read_tensors(folder):
    """All tensors of a folder under their own names: safetensors, in one file or more, or RLinf's .pt."""
    from safetensors.torch import load_file

    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("policy_p")]
    for index in folder.glob("*.safetensors.index.json"):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"has a {index.name} that cannot be read: it has no weight_map")
        gone = set(places.values()) - {file.name for file in files}
        if gone:
            raise ValueError(f"has no {some(sorted(gone))}, which its index lists")
    tensors, place = {}, {}
    for file in files:
        for key, tensor in load_file(file).items():
            if key in tensors:
                raise ValueError(
                    f"has {key} twice, in {place[key]} and in {file.name}: remove one of the files"
                )
            tensors[key], place[key] = tensor, file.name
    if files:
        return tensors
    for file in (folder / name for name in WEIGHTS):
        if file.is_file():
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensors, dict) or not all(map(is_plain, tensors.values())):
                raise ValueError(f"has a {file.name} that is no dictionary of plain tensors")
            return tensors
    raise ValueError("has no model.safetensors, and no weights under another name that is known here")


def is_plain(tensor):
    """Numbers in memory, each in its place: not on meta, quantised, sparse, nested or one number repeated."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_quantized or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


@torch.no_grad()
def is_sound(tensor):
    """Real numbers of a size that weights have: no NaN, no infinity, no exponent with a flipped bit."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return False
    low, high = tensor.aminmax() if tensor.numel() else (0, 0)
    return bool(-1e6 < low and high < 1e6)  # not so if one is NaN


def some(names, comma=", "):
    """The first of many."""
    return comma.join(names[:4]) + (f"{comma}and {len(names) - 4} more" if len(names) > 4 else "")


def rename(theirs, our_key):
    """Tensors under our names. Two that are one of ours, such as tied embeddings, have to be equal."""
    tensors, source = {}, {}
    for key, tensor in theirs.items():
        ours = our_key(key)
        if ours in tensors and not torch.equal(tensors[ours], tensor):
            raise ValueError(f"has two values of one tensor, {source[ours]} and {key}")
        tensors[ours], source[ours] = tensor, key
    return tensors


def read_stats(folder, tensors):
    """Statistics of state and actions: norm_stats.json, here or in a folder below (openpi), or lerobot's."""
    from safetensors.torch import load_file

    files = [folder / STATS]
    files = files if files[0].is_file() else sorted(folder.glob(f"**/{STATS}"))
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ValueError(f"has several {STATS} ({names}): copy the right one up into the folder")
    if files:
        return read_json(files[0]).get("norm_stats", {})
    for file in sorted(folder.glob("policy_p*_normalizer_processor.safetensors")):
        tensors = tensors | load_file(file)
    stats = {"state": {}, "actions": {}}
    for key, tensor in tensors.items():  # "observation.state.mean", "normalize_targets.buffer_action.mean"
        found = re.search(r"(observation[._]state|\baction|_action)\.(mean|std|q01|q99)$", key)
        if found and tensor.isfinite().all():  # lerobot's buffers are infinite until they are filled
            stats["state" if "state" in found[1] else "actions"][found[2]] = tensor.tolist()
    return stats


def check_stats(stats, config, file):
    """The statistics that are known here: those that normalise are there, and what is there can be."""
    known = sum(STATISTICS.values(), ())
    parts = {key: stats.get(key, {}) for key in ("state", "actions")}
    parts = {key: {s: part[s] for s in part if s in known} for key, part in parts.items()}
    least, greatest = names = STATISTICS[config.variant]
    absent = [f"{s} of {key}" for key in parts for s in names if s not in parts[key]]
    if absent:
        raise ValueError(f"has no {', '.join(absent)}: copy the {file} of its data there")
    for key, part in parts.items():
        most = config.state_dim if key == "state" else config.action_dim
        for s, numbers in part.items():
            numbers = numbers if isinstance(numbers, list) else [None]
            if not all(type(x) in (int, float) and abs(x) < 1e9 for x in numbers):  # nan is not below either
                raise ValueError(f"is broken: {s} of {key} in its statistics is no list of usual numbers")
            if not 0 < len(numbers) == len(part[least]) <= most:
                count = f"{len(numbers)} numbers ({least}: {len(part[least])}, the network: at most {most})"
                raise ValueError(f"is broken: {s} of {key} in its statistics has {count}")
        if any(x < 0 for x in part.get("std", ())):
            raise ValueError(f"is broken: std of {key} in its statistics is negative")
        pairs = list(zip(part[least], part[greatest]))
        if config.variant == "pi05" and any(low >= high for low, high in pairs):
            raise ValueError(f"is broken: q01 of {key} in its statistics is not below q99")
        if config.variant == "gr00t" and any(low > high for low, high in pairs):  # equal: what never moves
            raise ValueError(f"is broken: min of {key} in its statistics is above max")
    return stats | parts


def make_config(kind, tensors, sizes, rest, written):
    """With the sizes of heads and adapters; the rest as save_policy has `written` it, or else as guessed."""
    head = [tuple(tensors[key].shape) for key in tensors if re.match(r"value_head\.mlp\.\d+\.weight$", key)]
    if head:
        inputs = {sizes["expert_width"]: "expert", sizes["width"] + sizes["state_dim"]: "vlm"}
        sizes |= {"critic": inputs.get(head[0][1], ""), "critic_layers": len(head)}
        if not sizes["critic"] or [rows for rows, _ in head[:-1]] != [512 >> i for i in range(len(head) - 1)]:
            print(f"note: its value head, {head}, is of another kind than ours and left out", file=sys.stderr)
            sizes["critic"] = ""
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".lora_a")}
    sizes |= {"lora_rank": max(ranks)} if ranks else {}
    for key in tensors:  # RLinf stores logarithms of variances
        if re.search(r"logvar_(min|max)$", key):
            sizes[f"noise_std_{key[-3:]}"] = math.exp(0.5 * tensors[key].item())
    ours = {field.name: field.type for field in dataclasses.fields(kind)}
    strangers = [f"{key} {value!r}" for key, value in written.items() if type(value) is not ours.get(key)]
    if strangers:
        raise ValueError(f"has a config.json that cannot be read: {some(strangers)}")
    wrong = [key for key, size in sizes.items() if written.get(key, size) != size]
    if wrong:
        wrong = ", ".join(f"{key} is {sizes[key]} and not {written[key]}" for key in wrong)
        raise ValueError(f"is of another architecture than its config.json: {wrong}")
    return check_config(kind(**rest | written | sizes))


def read_tokenizer(file, vocab_size):
    """Its text, if it is a tokenizer that reads any text, and the VLM has its words."""
    from tokenizers import Tokenizer

    try:
        text = file.read_text()
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("pick up the red block \u00a7", add_special_tokens=False)
    except Exception as error:  # of no narrower class
        raise ValueError(f"has a tokenizer.json that cannot be read: {error}") from None
    most = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if most >= vocab_size:
        raise ValueError(f"has a tokenizer.json of another VLM: word {most}, where {vocab_size} are known")
    return text


def check_config(c):
    """Sizes that can be. Most come from the tensors; these are what a config.json told."""
    zero = {"delta_actions", "lora_rank", "lora_alpha", "robot", "mean_std_actions", "unmasked_padding"}
    for field in dataclasses.fields(c):
        value, least = getattr(c, field.name), 0 if field.name in zero | {"image_token"} else 1
        if type(value) is not field.type or (field.type is int and not least <= value < 2**20):
            raise ValueError(f"is broken: its {field.name} is {value!r}")
    low, high, tokenizers = c.noise_std_min, c.noise_std_max, ("paligemma", "words")
    rules = [
        (c.horizon <= 1000, "horizon", "at most 1000"),
        (c.vision_width % c.vision_heads == 0, "vision_heads", f"a divisor of {c.vision_width}"),
        (c.critic in ("", "expert", "vlm"), "critic", "expert or vlm or nothing"),
        (c.critic_layers <= 9, "critic_layers", "at most 9"),
        (low == high == 0 or 0 < low <= high <= 1e6, "noise_std_min", f"above 0 and at most {high}"),
        (c.lora_alpha or not c.lora_rank, "lora_alpha", "above 0"),
    ]
    if c.variant == "gr00t":
        tokenizers = "qwen3", "words"
        rules += [
            (c.horizon <= c.positions, "horizon", f"at most {c.positions}"),
            (c.heads % c.kv_heads == 0, "kv_heads", f"a divisor of {c.heads}"),
            (c.dit_width % c.dit_heads == 0, "dit_heads", f"a divisor of {c.dit_width}"),
            (c.width % c.context_heads == 0, "context_heads", f"a divisor of {c.width}"),
            (0 < c.crop <= 1, "crop", "above 0 and at most 1"),
            (c.mean_std_actions <= c.action_dim, "mean_std_actions", f"at most {c.action_dim}"),
            (c.image_token + 2 < c.vocab_size, "image_token", f"below {c.vocab_size - 2}"),
        ]
    else:
        rules += [(c.delta_actions <= c.action_dim, "delta_actions", f"at most {c.action_dim}")]
    rules += [(c.tokenizer in tokenizers, "tokenizer", " or ".join(tokenizers))]
    for right, name, what in rules:
        if not right:
            raise ValueError(f"is broken: its {name} is {getattr(c, name)!r} and has to be {what}")
    return c


@contextlib.contextmanager
def parameters_on_meta():
    """Modules built here have no memory for their parameters, only for what is not in a checkpoint."""
    real = nn.Module.register_parameter

    def register(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        real(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = real


def refuse(name, error, family):
    """Whatever went wrong with these files, in one line."""
    if isinstance(error, KeyError):
        fail(f"checkpoint '{name}' is {family.NEITHER}: missing {family.their_key(str(error.args[0]))}")
    if isinstance(error, PickleError):  # torch's own message says how to run what is in there
        fail(f"checkpoint '{name}' has a .pt file that holds more than tensors and could run code")
    what = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = what if what.startswith(("has ", "is ")) else f"cannot be read: {what}"
    fail(f"checkpoint '{name}' {what}")


def is_read(path):
    """Of a repository's files, those that are looked at here."""
    if path.endswith((".safetensors", ".safetensors.index.json")):
        return "/" not in path
    return path in WRITTEN - {"README.md"} or path in WEIGHTS or path.split("/")[-1] == STATS


def download(name):
    """The folder of a hub id, or of owner/name@revision, from the cache or the network."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    repository, _, revision = str(name).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or os.path.isdir(os.path.dirname(repository)):
        fail(f"checkpoint '{name}' does not exist: neither a folder nor the id of a model on the hub")
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
        told = hub.HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in told.siblings if is_read(file.rfilename)}
        if any(file.endswith(".safetensors") for file in sizes):  # then no .pt is
            sizes = {file: size for file, size in sizes.items() if file not in WEIGHTS}
        cached = {"revision": told.sha, "cache_dir": constants.HF_HUB_CACHE}
        new = [f for f in sizes if not isinstance(hub.try_to_load_from_cache(repository, f, **cached), str)]
        if new:
            size = f"{sum(sizes[file] for file in new) / 1e9:.2f} GB in {len(new)} files"
            print(f"downloading {name}: {size}, to {constants.HF_HUB_CACHE}", file=sys.stderr, flush=True)
        return Path(
            hub.snapshot_download(repository, revision=told.sha, allow_patterns=[*map(escape, sizes)])
        )
    except Exception as error:  # whatever went wrong on the way
        try:  # what came before is as good
            return Path(hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
        except Exception:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f"{repository} --revision {revision}" if revision else repository
        advice = f"where there is a network, do `hf download {place} --local-dir FOLDER`, bring it here"
        fail(f"checkpoint '{name}' cannot be downloaded ({reason}); {advice} and pass its path")


# ----------------------------------------------------------------------------------------------------- saving

WRITTEN = {"README.md", "args.json", "config.json", "tokenizer.json", STATS, "model.safetensors"}
WRITTEN |= {"experiment_cfg/metadata.json"}
CARD = "learning_curve.png", "episodes.gif"  # what cards.py adds; of the weights that were there then


def save_policy(policy, folder: str | os.PathLike, card="", args: dict | None = None):
    """Weights, sizes, statistics, tokenizer, card, flags of the run: a whole folder, or the old one stays.

    The new folder is written beside the old one and takes its place at once, when all of it is on the disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, files = Path(folder).resolve(), {"README.md": card.encode(), **policy.files()}
    if args:
        files["args.json"] = json.dumps(args, indent=1).encode()
    if policy.tokenizer_json:
        files["tokenizer.json"] = policy.tokenizer_json.encode()
    broken = [key for key, tensor in files["model.safetensors"].items() if not is_sound(tensor)]
    if broken:
        raise RuntimeError(f"not saved: NaN, infinity or numbers beyond 1e6 in {some(broken)}")
    others = strangers(folder)
    if others:
        raise FileExistsError(f"not saved: {folder} also has {others}")
    side = folder.with_name(f".{folder.name}.tmp")  # the same disk
    shutil.rmtree(side, ignore_errors=True)
    try:
        for name, content in files.items():
            (side / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                save_file(content, side / name, metadata={"format": "pt"})
            else:
                (side / name).write_bytes(content)
        for path in [side, *side.rglob("*")]:
            flush(path)
        exchange(side, folder)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(side, ignore_errors=True)  # what it holds now is cut off, or the old folder


def flush(path):
    """Onto the disk, so that a power cut does not leave a name without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(side, folder):
    """The side folder takes the other's name and place; an old one goes to the side."""
    if not folder.exists():
        os.rename(side, folder)
    else:
        libc, here, swap = ctypes.CDLL(None), -100, 2  # AT_FDCWD, RENAME_EXCHANGE: of Linux
        names = here, os.fsencode(side), here, os.fsencode(folder), swap
        if not hasattr(libc, "renameat2") or libc.renameat2(*names) != 0:
            old = folder.with_name(f".{folder.name}.old")  # elsewhere there is neither for a moment
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            os.rename(side, folder)
            os.rename(old, side)
    flush(folder.parent)


def strangers(folder):
    """What is in the way of saving there: files that `save_policy` would not write anew. Nothing is lost."""
    if os.path.lexists(folder) and not folder.is_dir():
        return "a file of this name"
    paths = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    names = (str(path.relative_to(folder)) for path in paths)
    return some(sorted(name for name in names if name.removesuffix(".tmp") not in {*WRITTEN, *CARD}))


def check_output(flag, folder):
    """A folder that `save_policy` will be able to write, before the work that it is for."""
    try:
        side = Path(folder).resolve()
        others = strangers(side)
        if others:
            fail(f"{flag} {folder} also has {others}: a policy has its folder to itself")
        if os.path.ismount(side):
            fail(f"{flag} {folder} is the root of a disk: choose a folder in it")
        side = side.with_name(f".{side.name}.tmp")
        new = [path for path in (side, *side.parents) if not path.exists()]
        try:
            side.mkdir(parents=True, exist_ok=True)
        finally:
            shutil.rmtree(new[-1] if new else side, ignore_errors=True)
    except (OSError, ValueError) as error:
        fail(f"{flag} {folder} cannot be written: {getattr(error, 'strerror', None) or error}")
