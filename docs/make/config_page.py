"""Write docs/config.md from configs/tapo_grpo.py: `python docs/make/config_page.py`. A test checks that it is current.

Names, defaults and order are those of the config itself; the meaning of a field is its sentence in `MEANINGS`, or its
comment in the config.
"""

import ast
import io
import tokenize
from pathlib import Path
from typing import Any

from tapo_jax.config import beside, flat

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tapo_grpo.py"
PAGE = ROOT / "docs" / "config.md"
RECIPE = "qwen3_vl_4b"

HEAD = (Path(__file__).parent / "config_head.md").read_text(encoding="utf-8")

SECTIONS = {
    "": "A run",
    "data": "data: the questions",
    "model": "model: weights and memory",
    "rollout": "rollout: how episodes are played",
    "tools": "tools: what the policy can call",
    "reward": "reward: what an episode is worth",
    "algorithm": "algorithm: advantages and loss",
    "tapo": "tapo: credit transfer",
    "optimizer": "optimizer",
    "train": "train: updates and their shapes",
    "mesh": "mesh: how devices share the work",
    "checkpoint": "checkpoint",
    "log": "log",
    "eval": "eval: held-out questions",
    "benchmarks": "benchmarks: published test sets",
}

MEANINGS = {
    "seed": "seed of everything random: the order of questions, the tokens drawn, controls; from 0 to 2³¹ − 1",
    "total_steps": "training steps: one step is one batch of rollouts and `train.updates_per_batch` updates",
    "data.extra": "free fields for your own function of questions",
    "tools.extra": "free fields for your own function of tools",
    "tools.request": "further fields of every request to the search service, by their names there; no key belongs here",
    "tools.backend": "who answers text searches: search-r1, mars, serper, tavily or ddgs ([search](search.md))",
    "tools.max_failures": "share of failing requests to a service, among the last `tools.failure_window`, above which "
    "the run stops; 1: never",
    "reward.extra": "keyword arguments of your own reward",
    "data.source": '"atlas", "jsonl" (your own folder data.dir) or your own "package.module:function"',
    "reward.source": '"rewards" (exact match and format) or your own "package.module:function"',
    "algorithm.aggregation": "how tokens become one number: token_mean, seq_mean_token_mean, seq_mean_token_sum_norm; "
    "unset: the loss's own",
    "rollout.slots": "conversations that are played at a time, over all devices",
    "rollout.decode_chunk": "tokens that are decoded between two looks at which turns have ended",
    "rollout.tool_wait_s": "how long a round waits for tools; finite: faster with slow tools, but not repeatable",
    "rollout.mesh.data": "while episodes are played: pieces that the conversations are split into; −1: the rest",
    "rollout.mesh.tensor": "while episodes are played: ways that heads, hidden units and vocabulary are split; it "
    "divides the model's key/value heads, and no weight is gathered; 0: the layout of training, `mesh`",
    "data.split": "the split that is trained on",
    "data.prompts_per_step": "questions of a step (P), over all processes; a multiple of the number of processes",
    "data.hops": "Atlas: numbers of look-ups that a question may take",
    "data.outlines": "Atlas: countries drawn in a scene",
    "data.size": "Atlas: side of a scene, in pixels",
    "data.outline": "Atlas: smallest and largest outline, as a share of the scene's side",
    "data.world_seed": "Atlas: seed of the questions, so that runs of different `seed` get the same ones",
    **{
        f"data.mix.{kind}": f"Atlas: share of the questions {about}, in any unit"
        for kind, about in (
            ("open", "whose answers cannot be guessed"),
            ("continent", "on which continent a country is"),
            ("position", "whether a country is landlocked or coastal"),
            ("border", "whether two countries of the scene share a border"),
            ("larger", "which of two countries of the scene is larger"),
            ("populous", "which of two countries of the scene has more people"),
        )
    },
    "data.sizes": 'Atlas: numbers of questions of the splits "train" and "held_out"',
    "model.param_dtype": "type of the stored parameters and of the optimizer's state",
    "model.remat": 'rematerialisation in the backward pass: "none", "dots" (keep matrix products), "full"',
    "model.logp_chunk": "tokens of a row whose logits exist at one time; log-probabilities are computed in chunks",
    "model.train_vision": "train the vision tower too",
    "model.lora_rank": "> 0: rank of low-rank updates; they alone are trained",
    "model.lora_modules": 'kernels that get low-rank updates: of the decoder, or "vision/qkv", "vision/proj", …',
    "model.lora_alpha": "scale of the updates is alpha / rank; unset: the rank, so a scale of 1",
    "rollout.group_size": "rollouts of each question (G)",
    "rollout.max_turns": "assistant turns of an episode",
    "rollout.max_pixels": "largest height · width of an image; 0: what the model directory says",
    "rollout.temperature": "of sampling; the loss uses the same temperature for its log-probabilities",
    "rollout.top_p": "nucleus sampling; 1: off",
    "tools.names": "the tools of the source that the policy is shown, in this order",
    "tools.timeout_s": "seconds that one try of a call may take",
    "tools.retries": "further tries after an exception of the tool itself, or after a refusal of a service",
    "tools.workers": "threads that run tools",
    "tools.zoom_size": "of a crop of Atlas: longest side in pixels; 0: its own pixels, as for all other pictures",
    "tools.image_top_k": "results of an image search",
    "tools.thumbnails": "images that an image search returns with its results",
    "tools.text_top_k": "passages of a text search",
    "tools.text_budget": "characters of all passages of a text search together",
    "reward.accuracy": "weight of the reward `accuracy`; `accuracy` = 1 is a success for TAPO",
    "reward.format": "weight of the reward `format`",
    "reward.weights.accuracy": "weight of the reward `accuracy`; `accuracy` = 1 is a success for TAPO",
    "reward.weights.format": "weight of the reward `format`",
    "algorithm.clip_low": "the ratio is clipped below at 1 − clip_low (grpo, gspo, cispo)",
    "algorithm.clip_high": "the ratio is clipped above at 1 + clip_high",
    "algorithm.clip_dual": "> 1: bound of the loss where the advantage is negative (dual clip); unset: none",
    "algorithm.tau_pos": "SAPO's temperature of tokens with a positive advantage",
    "algorithm.tau_neg": "SAPO's temperature of the other tokens",
    "algorithm.kl_coef": "weight of the KL term towards the model that the run begins with; 0: none, no reference kept",
    "algorithm.kl_estimator": "k1, k2 or k3",
    "algorithm.importance_cap": "cap of the ratio of the trainer's to the sampler's probability; None: no correction",
    "algorithm.dynamic_sampling": "groups whose rewards are all equal leave the loss",
    "algorithm.credit": '"trajectory" (the base algorithm alone), "tapo" or "gigpo" (arXiv 2505.10978)',
    "tapo.enabled": "False: the base algorithm alone; TAPO's diagnostics are logged all the same",
    "tapo.theta": "smallest similarity at which a step may borrow credit",
    "tapo.alpha_min": "smallest similarity × support at which a step may borrow credit (the second gate)",
    "tapo.beta": "share of the witnesses' credit that is given back",
    "tapo.cluster": '"components" (connected components of similarity ≥ cluster_theta) or "leader" (greedy)',
    "tapo.cluster_theta": "similarity at which two witnesses are one cluster; unset: theta",
    "tapo.aggregate": 'advantage of a cluster: "mean", "max" or "min" over its trajectories',
    "tapo.support": "False: support counts as 1 everywhere (ablation)",
    "tapo.clip": "False: a corrected advantage may become positive (ablation)",
    "tapo.scope": 'witnesses of the same question ("prompt") or of the whole batch ("batch")',
    "tapo.text": "similarity of texts: dice, cosine, jaccard, exact, or embedding (the policy's own embedding table)",
    "tapo.features": "features that the words and trigrams of a text are hashed into",
    "tapo.steps": "tool steps of a rollout that TAPO sees (K), at least `rollout.max_turns`",
    "tapo.max_tool_steps": "tool steps of a rollout that TAPO sees (K), at least `rollout.max_turns`",
    "tapo.control": 'what TAPO must beat: "shuffled" (its corrections on random failing steps), "zero_tools" (no tool '
    'step of a failure is punished); "none"',
    "tapo.gigpo_omega": "GiGPO: weight of the step's advantage beside the trajectory's",
    "tapo.gigpo_discount": "GiGPO: discount of the return of a step",
    "algorithm.gigpo_omega": "GiGPO: weight of the step's advantage beside the trajectory's",
    "algorithm.gigpo_discount": "GiGPO: discount of the return of a step",
    "tapo.chunks": "parts of the batch's questions whose pairs of steps are in memory at one time",
    "tapo.adaptive_theta": "beyond the paper: a theta for each tool, following how similar its witnesses are",
    "tapo.adaptive_quantile": "the quantile of these similarities that theta follows",
    "tapo.adaptive_rate": "how fast theta moves, per step",
    "tapo.memory_steps": "beyond the paper: steps that successful rollouts stay witnesses of their question; 0: off",
    "tapo.memory_size": "remembered rollouts of a question",
    "tapo.memory_discount": "factor of a remembered rollout's weight for each step of its age",
    "optimizer.lr": "peak learning rate of AdamW",
    "optimizer.schedule": "constant, cosine or linear, after the warm-up",
    "optimizer.warmup_steps": "steps in which the rate rises linearly from 0",
    "optimizer.b1": "decay of the first moment",
    "optimizer.b2": "decay of the second moment",
    "optimizer.weight_decay": "of matrices only",
    "optimizer.grad_clip": "largest global norm of the gradient",
    "optimizer.vision_lr_multiplier": "factor of the rate in the vision tower",
    "train.updates_per_batch": "mini-batches that a batch of rollouts is split into, one update each",
    "train.micro_batches": "least number of parts that a mini-batch is computed in, one after another",
    "train.length_buckets": "tokens that a micro-batch may be cut to, ascending; the largest possible is added",
    "train.patch_buckets": "the same for image patches",
    "mesh.data": "replicas; −1: the rest of the devices",
    "mesh.fsdp": "ways that parameters, optimizer state and batch are split",
    "mesh.tensor": "ways that heads, hidden units and vocabulary are split",
    "checkpoint.every": "steps between two checkpoints; the last step always gets one",
    "checkpoint.minutes": "minutes after which a further one is saved, also in the middle of a rollout; 0: none",
    "checkpoint.keep": "checkpoints that are kept",
    "log.episodes_every": "steps between two recordings of all episodes; the first step is always recorded",
    "log.tensorboard": "write TensorBoard files next to metrics.jsonl",
    "eval.split": "the split that is evaluated on",
    "eval.prompts": "questions of an evaluation, the same ones every time",
    "eval.every": "steps between two evaluations; 0: none in between",
    "eval.at_start": "evaluate before the first step",
    "eval.at_end": "evaluate after the last step",
    "eval.temperature": "of sampling in evaluations; 0: greedy",
    "eval.top_p": "nucleus sampling in evaluations; 1: off",
    "eval.top_k": "tokens that may be drawn in evaluations; 0: all. The trainer cannot reproduce it",
    "eval.min_p": "the least probability of a token in evaluations, as a share of the most probable one's; 0: none",
    "eval.presence_penalty": "taken from the logits of tokens that a turn holds already, in evaluations; 0: nothing",
    "benchmarks.mmsearch": 'folder of MMSearch, like the others for `launch/eval.py`; "": left out',
    "benchmarks.hr_mmsearch": "folder of HR-MMSearch",
    "benchmarks.fvqa_test": "folder of FVQA, whose test split is evaluated",
    "benchmarks.infoseek": "folder of InfoSeek",
    "benchmarks.simplevqa": "folder of SimpleVQA, whose English questions are evaluated",
    "benchmarks.livevqa": "folder of LiveVQA",
    "benchmarks.mat_search": "folder of MAT, whose part MAT-Search is evaluated",
}


def comments(source: str) -> dict[str, str]:
    """Read the comment of every field: the one at the end of its line, else the lines above it, up to the next comment.

    A comment at the end of a line belongs to the last field of the line.
    """
    at_end, above = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string != "# fmt: skip":
            alone = not token.line[: token.start[1]].strip()
            (above if alone else at_end)[token.start[0]] = token.string.removeprefix("# ")
    found: dict[str, str] = {}
    for section in sections(ast.parse(source)):
        block: list[str] = []
        line = section[0][1] - 1
        for name, start, stop, last in section:
            lines = range(line + 1, start)
            if any(number in above for number in lines):
                block = [above[number] for number in lines if number in above]
            if stop in at_end and last:
                found[name], block = at_end[stop], []
            elif block:
                found[name] = " ".join(block)
            line = stop
    return found


def sections(tree: ast.Module) -> list[list[tuple[str, int, int, bool]]]:
    """List (field, first line, last line, whether it is the last field of its line) of every assignment to `c`."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        target = node.targets[0]
        if not isinstance(target.value, ast.Name) or target.value.id != "c":
            continue
        fields = keywords(node.value, target.attr) or [(target.attr, node.lineno, node.end_lineno or node.lineno)]
        lasts = {stop: name for name, _, stop in fields}
        found.append([(name, start, stop, lasts[stop] == name) for name, start, stop in fields])
    return found


def keywords(value: ast.expr, prefix: str) -> list[tuple[str, int, int]]:
    """List the fields of `ConfigDict(dict(a=1, b=ConfigDict(dict(c=2))))` with their lines, in order."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
        return []
    if value.func.id == "ConfigDict":
        return keywords(value.args[0], prefix) if value.args else []
    if value.func.id != "dict":
        return []
    found = []
    for keyword in value.keywords:
        name = f"{prefix}.{keyword.arg}"
        inner = keywords(keyword.value, name)
        found += inner or [(name, keyword.value.lineno, keyword.value.end_lineno or keyword.value.lineno)]
    return found


def fields(argument: str) -> dict[str, Any]:
    """Return the fields of the config in the order of the file; a section without fields is a field with value {}."""
    config = beside(str(CONFIG), CONFIG.name)(argument)
    values = flat(config)
    order = [name for section in sections(ast.parse(CONFIG.read_text(encoding="utf-8"))) for name, *_ in section]
    return {name: values.get(name, {}) for name in dict.fromkeys([*order, *values])}


def meanings() -> dict[str, str]:
    """Return the meaning of every field of the config. Raises KeyError if a field has none."""
    commented = comments(CONFIG.read_text(encoding="utf-8"))
    found = {}
    for name in fields(""):
        text = MEANINGS.get(name) or commented.get(name)
        if text is None:
            raise KeyError(f"{name} has no meaning: give it a comment in {CONFIG.name}, or a sentence in MEANINGS.")
        found[name] = text
    return found


def page() -> str:
    """Return the text of docs/config.md."""
    default, recipe, meaning = fields(""), fields(RECIPE), meanings()
    lines = [HEAD]
    for section in dict.fromkeys(name.rpartition(".")[0].split(".")[0] for name in default):
        names = [name for name in default if name.rpartition(".")[0].split(".")[0] == section]
        lines += [
            f"## {SECTIONS.get(section, section)}\n",
            f"| field | default | meaning | {RECIPE} |",
            "|---|---|---|---|",
        ]
        for name in names:
            other = "" if recipe[name] == default[name] else shown(recipe[name])
            lines.append(
                f"| `{name}` | {shown(default[name])} | {meaning[name].replace('|', chr(92) + '|')} | {other} |"
            )
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a value as it is written in the config; "–" if it is unset."""
    text = "" if value is None else repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"`{text}`" if text else "–"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
