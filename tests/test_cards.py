"""Model cards: what they say, what they leave as it was, and the way to a hub and back."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import make_policy
from huggingface_hub import ModelCard
from PIL import Image

import evaluate
import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from cards import compose
from flags import parse, read
from layouts import check_output
from pi_models import load_policy, save_policy
from simulators import tabletop

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = "--env-id tabletop_press_button --num-threads 1 --card".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run, from an untrained policy: its folder."""
    folder = tmp_path_factory.mktemp("run")
    save_policy(make_policy(), folder / "start")
    words = "--env-id tabletop_press_button --num-envs 4 --num-steps 2 --num-minibatches 1 --eval-freq -1"
    words = [*words.split(), "--critic-warmup", "0", "--total-timesteps", "70", "--save-freq", "1"]
    words += ["--checkpoint", str(folder / "start"), "--run-dir", str(folder / "runs")]
    flow_sde_ppo.main(parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, words))
    (folder,) = (folder / "runs").iterdir()
    return folder


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """The checkpoint of a copy of it; evaluations are short."""
    monkeypatch.setattr(tabletop, "EVAL_STATES", 3)
    monkeypatch.setattr(tabletop.Tabletop, "max_episode_steps", 10)
    return shutil.copytree(run, tmp_path / run.name) / "checkpoint"


def card(folder, *words):
    evaluate.main(read(evaluate.Args, ["--checkpoints", str(folder), *EVALUATION, *words]))
    return (folder / "README.md").read_text()


def commands(text):
    return [shlex.split(line) for line in re.findall(r"^```bash\n(.+)\n```$", text, re.MULTILINE)]


def test_card(folder, capsys):
    """Header, table, commands, pictures. The commands are the evaluation and the training again."""
    words = ["--seeds", "0", "4", "--denoise-steps", "2"]
    before = (folder / "README.md").read_text()
    text, out = card(folder, *words), capsys.readouterr().out
    data = ModelCard(text).data.to_dict()  # as the hub reads it
    assert data["license"] == "mit" and data["pipeline_tag"] == "robotics" and "base_model" not in data
    assert {"reinforcement-learning", "pi0", "tabletop_press_button"} <= set(data["tags"])
    assert text.count(f"# {folder.parent.name}\n") == 1 and "trained by Flow-SDE PPO" in text
    (table,) = re.findall(r"^\| task .+?torch \S+$", out, re.MULTILINE | re.DOTALL)
    assert table in text and "95% interval" in table and "evaluation seed 0, 4" in table
    assert text.rstrip().endswith(before.split("\n\n", 1)[1].strip())  # how it was made
    (python, script, *again), (python_too, trainer, *training) = commands(text)
    assert [python, script, python_too, trainer] == ["python", "evaluate.py", "python", "flow_sde_ppo.py"]
    args = read(evaluate.Args, again)
    asked = read(evaluate.Args, ["--checkpoints", str(folder), *EVALUATION, *words])
    assert args == dataclasses.replace(asked, card=False, chunk_len=5)
    args = flow_sde_ppo.Args(**json.loads((folder / "args.json").read_text()))
    assert parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, training) == args
    curve = (folder.parent / "learning_curve.png").read_bytes()
    assert (folder / "learning_curve.png").read_bytes() == curve
    assert re.findall(r"\]\((\w+\.\w+)\)", text) == ["episodes.gif", "learning_curve.png"]
    assert Image.open(folder / "episodes.gif").n_frames > 5
    evaluate.main(read(evaluate.Args, again))
    assert table.split("\n\n")[0] in capsys.readouterr().out


def test_a_second_card(folder):
    first = card(folder)
    assert card(folder) == first and not list(folder.glob("*.tmp"))
    assert "--stochastic --chunk-len 5 --denoise-steps 4 --noise sde" in card(folder, "--stochastic")


def test_what_people_wrote_stays(folder, tmp_path):
    """Also below a header of theirs, and beside a GIF that is asked for."""
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# Mine\n\nMade with love.\n\n- a list\n"
    )
    text = card(folder, "--capture-video", str(tmp_path / "mine.gif"))
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "mit" and text.count("---\n") == 2
    assert "\n# Mine\n" in text and text.endswith("\n\nMade with love.\n\n- a list\n")
    assert (folder / "episodes.gif").read_bytes() == (tmp_path / "mine.gif").read_bytes()


def test_a_policy_without_a_run(folder, tmp_path):
    save_policy(load_policy(folder), tmp_path / "plain")
    text = card(tmp_path / "plain")
    assert "\n# plain\n" in text and "trained" not in text and "reinforcement" not in text
    assert len(commands(text)) == 1 and not (tmp_path / "plain" / "learning_curve.png").exists()


@pytest.mark.parametrize("script", [flow_noise_ppo, flow_sde_grpo])
def test_which_algorithm(folder, script):
    told = dataclasses.asdict(script.Args(env_id="tabletop_press_button"))
    (folder / "args.json").write_text(json.dumps(told))
    (folder.parent / "resume" / "0000009.rank0of4.safetensors").touch()
    for old in (folder.parent / "resume").glob("*.rank0of1.*"):
        old.unlink()
    text = card(folder)
    name = {"flow_noise_ppo": "Flow-Noise PPO", "flow_sde_grpo": "Flow-SDE GRPO"}[script.__name__]
    assert f"trained by {name} on" in text
    *launcher, trainer = commands(text)[1][:4]
    assert [*launcher, trainer] == [
        "torchrun",
        "--standalone",
        "--nproc_per_node=4",
        f"{script.__name__}.py",
    ]


@pytest.mark.parametrize("base, known", [("somebody/pi0", True), ("somebody/pi0@main", True), ("a/b", False)])
def test_weights_of_others(tmp_path, monkeypatch, base, known):
    """Their licence is not ours to say. A base model is named if it came from the hub."""
    (tmp_path / "models--somebody--pi0").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    policy = make_policy(tokenizer="paligemma")
    told = dataclasses.asdict(flow_sde_ppo.Args(checkpoint=base))
    sampler = flow_sde_ppo.Args()
    args = evaluate.Args(checkpoints=(str(tmp_path),))
    chosen = evaluate.SimpleNamespace(**{name: getattr(sampler, name) for name in evaluate.SAMPLER})
    text = compose(args, policy, chosen, "a table", told, tmp_path, "")
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "other" and data.get("base_model") == ("somebody/pi0" if known else None)
    assert "The base model's licence applies." in text and "MIT" not in text


def test_a_carded_folder_is_a_checkpoint(folder):
    """It loads, is saved anew, and its run goes on. What a card added goes with the weights it was of."""
    card(folder)
    policy = load_policy(folder)
    words = ["--resume", str(folder.parent), "--total-timesteps", "140"]
    flow_sde_ppo.main(parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, words))
    assert "license" not in (folder / "README.md").read_text()
    assert not (folder / "episodes.gif").exists() and not (folder / "learning_curve.png").exists()
    assert any(not p.equal(q) for p, q in zip(policy.parameters(), load_policy(folder).parameters()))
    card(folder)
    check_output("--output", folder)
    save_policy(policy, folder)
    (folder / "mine.png").touch()
    with pytest.raises(FileExistsError, match="also has mine.png"):
        save_policy(policy, folder)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--checkpoints", "a", "b"], "give one of --checkpoints"),
        (["--checkpoints", "somebody/pi0"], "somebody/pi0 is none"),
        (["--upload", "mine"], "--upload mine must be OWNER/NAME"),
        (["--upload", "a/b/c"], "must be OWNER/NAME"),
        (["--upload", "a/b"], "there is no token; `hf auth login`"),
    ],
)
def test_mistakes(folder, words, says, monkeypatch, tmp_path, one_line_error):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = sorted(folder.iterdir())
    words = words if "--checkpoints" in words else ["--checkpoints", str(folder), *words]
    assert says in one_line_error(lambda: evaluate.main(read(evaluate.Args, [*EVALUATION, *words])))
    assert sorted(folder.iterdir()) == before


def test_without_the_hub(folder, monkeypatch, one_line_error):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = ["--checkpoints", str(folder), "--upload", "a/b"]
    message = one_line_error(lambda: evaluate.main(read(evaluate.Args, words)))
    assert message == "error: --upload needs the hub: pip install huggingface_hub\n"


def test_a_card_that_cannot_be_written(folder, one_line_error, capsys):
    """Before an episode is played where that is possible; else it is as it was."""
    words = ["--checkpoints", str(folder), *EVALUATION]
    text = b"caf\xe9, of another encoding"
    (folder / "README.md").write_bytes(text)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(read(evaluate.Args, words))
    (message,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "README.md cannot be written ('utf-8' codec" in message
    assert (folder / "README.md").read_bytes() == text and not list(folder.glob("*.tmp"))
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    assert "README.md cannot be written" in one_line_error(lambda: evaluate.main(read(evaluate.Args, words)))


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """What of the hub's interface huggingface_hub uses here; `files` are those of the one repository."""

    files, created, sha = {}, [], "1" * 40

    def answer(self, content=b"", **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"https://huggingface.co/{'/'.join(self.path.split('/')[3:5])}"
        if self.path == "/api/repos/create":
            self.created.append((json.loads(body), self.headers["Authorization"]))
            told = {"url": "https://huggingface.co/somebody/press"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            told = {
                "files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            }
        elif "/validate-yaml" in self.path:
            told = {"errors": [], "warnings": []}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            told = {"commitUrl": f"{url}/commit/{self.sha}", "commitOid": self.sha, "success": True}
        self.answer(json.dumps(told).encode(), Content_Type="application/json")

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            told = {"id": "somebody/press", "sha": self.sha, "siblings": siblings}
            if "/tree/" in self.path:
                told = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in self.files.items()
                ]
            self.answer(json.dumps(told).encode(), Content_Type="application/json")
        elif "/resolve/" in self.path:
            content = self.files[self.path.split(f"/resolve/{self.sha}/")[1]]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.sha)
        else:
            self.answer(b"{}", Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files.clear()
    Hub.created.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SHORT = """
import sys, evaluate
from flags import read
from simulators import tabletop
tabletop.EVAL_STATES, tabletop.Tabletop.max_episode_steps = 3, 10
evaluate.main(read(evaluate.Args, sys.argv[1:]))
"""


def shell(tmp_path, hub, *words):
    """Another process: huggingface_hub reads the environment once."""
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", SHORT, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_there_and_back(folder, tmp_path, hub):
    """What is uploaded, and no file more, is the policy again for whoever asks for its name."""
    (folder / "secret.txt").write_text("mine")
    (folder / "nested").mkdir()
    (folder / "nested" / "model.safetensors").write_text("mine")
    done = shell(tmp_path, hub, "--checkpoints", str(folder), *EVALUATION, "--upload", "somebody/press")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: {hub}/somebody/press"
    ((asked, token),) = Hub.created
    assert (asked["organization"], asked["name"], token) == ("somebody", "press", "Bearer hf_secret")
    known = {"README.md", "args.json", "config.json", "tokenizer.json", "norm_stats.json"}
    assert Hub.files.keys() == known | {"model.safetensors", "episodes.gif", "learning_curve.png"}
    assert all(content == (folder / name).read_bytes() for name, content in Hub.files.items())
    text = Hub.files["README.md"].decode()
    (_, _, *again), _ = commands(text)
    assert again[:2] == ["--checkpoints", "somebody/press"]
    back = shell(tmp_path, hub, *again)
    assert back.returncode == 0, back.stderr
    assert "downloading somebody/press: 0.00 GB in 5 files" in back.stderr
    rates = re.findall(r"^\| \*\*mean\*\* .+ (\*\*.+\*\*)", text + back.stdout, re.MULTILINE)
    assert len(rates) == 2 and rates[0] == rates[1]


@pytest.mark.slow
def test_no_network(folder, tmp_path):
    """The card is there, one line says how to go on, exit code 1."""
    nowhere = "http://127.0.0.1:9"
    done = shell(tmp_path, nowhere, "--checkpoints", str(folder), *EVALUATION, "--upload", "somebody/press")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the card is written, but not uploaded (")
    assert f"`hf upload somebody/press {folder}`" in done.stderr
    assert (folder / "README.md").read_text().startswith("---\nlicense")
    done = shell(tmp_path, nowhere, "--checkpoints", "somebody/press")
    assert done.returncode == 2 and "hf download somebody/press" in done.stderr
    assert "onnection refused" in done.stderr  # and not a mistake of ours, which would end like this too
