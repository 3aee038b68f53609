"""TAPO on GRPO. The complete config: every field that the program reads is here.

    python launch/train.py --config=configs/tapo_grpo.py --workdir=/tmp/tapo
    python launch/train.py --config=configs/tapo_grpo.py:steps=20,seed=1 --workdir=/tmp/tapo_1
    python launch/train.py --config=configs/tapo_grpo.py:qwen3_vl_4b --config.model.path=DIR --workdir=…  # every host

Without an argument: Atlas (the embedded world) and the tiny model that ships with the package; runs on any machine.
Arguments: `steps=…`, `seed=…`, `test` (takes seconds, for tests), `band` (Atlas with questions that can be guessed, and
its own tiny model), `qwen3_vl_2b`, `_4b`, `_8b`, `_32b` (the paper's recipe, for pods: recipes.py), `qwen3_vl_2b_1gpu`
and `qwen3_vl_2b_v5e_8` (one GPU, one host of TPUs).
Any field can be set on the command line: `--config.tapo.beta=0.4`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tapo_jax.config import beside, parse_arg

SIZES = ("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "qwen3_vl_2b_1gpu", "qwen3_vl_2b_v5e_8")


def get_config(arg: str = "") -> ConfigDict:
    a = parse_arg(arg, steps=60, seed=0, test=False, band=False, **dict.fromkeys(SIZES, False))
    c = ConfigDict()
    c.seed = a.seed
    c.total_steps = a.steps
    c.total_epochs = 0.0  # > 0: this many passes over the training questions instead of total_steps

    c.data = ConfigDict(dict(
        source="atlas",  # "atlas", "jsonl" (your own folder data.dir) or "package.module:function"
        split="train", prompts_per_step=8,
        dir="",  # "" is a folder of the user's cache
        # Atlas: numbers of look-ups of a question, countries of a scene, its side in pixels, smallest and largest
        # outline as a share of the side, seed of the questions, sizes of the splits "train" and "held_out".
        hops=(1, 2), outlines=2, size=256, outline=(0.24, 0.36), world_seed=0, sizes=(2048, 512),
        # Shares, in any unit, of Atlas's kinds of question: "open" ones, whose answers cannot be guessed; about one
        # country its continent and its position (landlocked or coastal); about two of the scene whether they share a
        # border, which is larger, which is more populous.
        mix=ConfigDict(dict(open=1.0, continent=0.0, position=0.0, border=0.0, larger=0.0, populous=0.0)),
        extra=ConfigDict(),  # free, for your own function
    ))  # fmt: skip
    c.model = ConfigDict(dict(
        path="",  # a directory in Hugging Face form; "" is the tiny Atlas model that ships, "atlas_band" that of `band`
        shape="",  # the published model that this config is for; its directory has to be given then
        dtype="float32",  # of the computation
        param_dtype="float32",
        remat="none",  # rematerialisation in the backward pass: "none", "dots", "full"
        logp_chunk=128,  # tokens of a row whose logits exist at one time
        train_vision=False,
        # > 0: low-rank updates of these kernels of the decoder (or "vision/qkv", …) are trained, and nothing else.
        lora_rank=0, lora_modules=("q", "k", "v", "o", "gate", "up", "down"), lora_alpha=placeholder(float),
    ))  # fmt: skip
    c.rollout = ConfigDict(dict(
        system="",  # what the policy is told before everything else; recipes.py says how to answer
        group_size=8,
        slots=64,  # conversations that are played at a time, over all devices
        # Keys and values in pages: a conversation takes what it fills, the samples of a question share its prompt's.
        page_size=0,  # tokens of a page; on TPU a multiple of 128; 0: none, every slot takes max_length tokens
        pages=0,  # of all devices; when they run out the youngest conversation waits; 0: as many as full slots need
        max_turns=6,
        max_new_tokens=96,  # of one turn
        max_think_tokens=0,  # of a turn before its thought is closed by force, outside of the loss; 0: no such budget
        max_length=640,  # of a conversation, images and tool responses included
        max_image_tokens=144,  # of all images of a conversation; 0: as many as max_length
        max_pixels=0,  # max height · width of an image; 0: as in the model directory
        temperature=1.0, top_p=1.0,
        decode_chunk=16,  # tokens between two checks of which turns have ended
        # The devices of the run as data × tensor while episodes are played: conversations are split over data, heads,
        # hidden units and vocabulary over tensor, and no weight is gathered. data -1: the rest; tensor 0: as in `mesh`.
        mesh=ConfigDict(dict(data=-1, tensor=0)),
        carry=0,  # groups that may be unfinished when a rollout ends; they go on in the next step, under its weights
        max_staleness=1,  # steps after the one in which it began, by which a carried group has to be finished
        tool_wait_s=float("inf"),  # how long a round waits for tools; finite: faster with slow tools, not repeatable
    ))  # fmt: skip
    c.tools = ConfigDict(dict(
        source="atlas",  # or "recorded", "mcp", "verl" (docs/extend.md), or your own "package.module:function"
        names=("image_zoom_in_tool", "image_search_tool", "text_search_tool"), timeout_s=10.0, retries=1, workers=4,
        # Atlas: long side of a crop in pixels; 0: its own pixels, as for all other pictures.
        zoom_size=64, image_top_k=1, thumbnails=0, text_top_k=1, text_budget=400,
        # Who answers text searches: "search-r1" (launch/retrieval_server.py and its kin), "mars", "serper", "tavily" or
        # "ddgs"; docs/search.md says what each is asked, and in which environment variable its key is.
        backend="search-r1",
        endpoint="",  # "http://host:port"; "": that of serper and tavily; with search-r1, the search of this process
        request=ConfigDict(),  # further fields of every request to the service
        requests_per_second=0.0,  # to a service, of each process; 0: no limit
        max_failures=0.5,  # share of failing requests among the last failure_window, above which the run stops
        failure_window=50,  # requests; they are judged from 20 on, or from failure_window if that is less
        visit_budget=4000,  # characters of a page that the tool "visit" gives; tools.names may have it
        cache="",  # a file (SQLite) of what the service answered, shared by processes and runs; "": none
        record="",  # a folder that gets every search of the run and its outcome, to be replayed; "": none
        replay="",  # a folder of `tools.record`: its searches, without a service; others are the error replay_miss
        mcp="",  # a JSON file of MCP servers, {"mcpServers": …}, whose tools are added to those of the source; "": none
        verl="",  # the YAML file of the source "verl"
        kinds=ConfigDict(),  # tool -> property -> how TAPO compares it, instead of what its schema says
        parallel_calls=1,  # calls that a turn may have; they run at the same time, and each is a tool step
        max_response_tokens=0,  # of the text of one response, which is cut after them; 0: as many as fit
        extra=ConfigDict(),
    ))  # fmt: skip
    c.reward = ConfigDict(dict(
        source="rewards",  # an episode -> named numbers; or your own "package.module:function"
        weights=ConfigDict(dict(accuracy=1.0, format=0.5)),  # of each; success for TAPO is accuracy alone
        workers=1,  # threads that your own function is called on; it has to be thread-safe where they are more
        # A language model that judges what exact match calls wrong.
        judge=ConfigDict(dict(
            endpoint="",  # "http://host:port/v1", OpenAI-compatible; "": no judge
            model="",  # the name that the endpoint knows it by
            key_variable="JUDGE_API_KEY",  # the environment variable that holds the key; "": without a key
            concurrency=64,  # judgements at a time
            timeout_s=60.0,  # of one request
            retries=5,  # further requests after one that failed
            max_failed=0.05,  # share of judgements that may fail before the run stops
            cache="",  # a file that keeps verdicts, so that nothing is asked twice; "": none
        )),
        extra=ConfigDict(),  # keyword arguments of your own function
    ))  # fmt: skip
    c.algorithm = ConfigDict(dict(
        # Who gets the credit of a trajectory: "trajectory" (all its tokens alike), "tapo", or "gigpo" (arXiv
        # 2505.10978: turns are compared where they start from the same observation).
        credit="tapo", gigpo_omega=1.0, gigpo_discount=0.95,
        estimator="grpo",  # grpo, dr_grpo, rloo, reinforce_pp_baseline
        loss="grpo",  # grpo, gspo (token form), sapo, cispo
        clip_low=0.2, clip_high=0.2, clip_dual=placeholder(float), tau_pos=1.0, tau_neg=1.05,
        aggregation=placeholder(str),  # None: the loss's own; token_mean, seq_mean_token_mean, seq_mean_token_sum_norm
        kl_coef=0.0, kl_estimator="k3",  # towards the model that the run begins with
        importance_cap=2.0,  # truncation of trainer / sampler probability; None: no correction
        dynamic_sampling=False,  # groups without signal leave the loss
        overlong_buffer=0,  # tokens before max_length in which a penalty grows to 1
    ))  # fmt: skip
    c.tapo = ConfigDict(dict(
        theta=0.7, alpha_min=0.25, beta=0.8, cluster="components", cluster_theta=placeholder(float),
        aggregate="mean", support=True, clip=True, scope="prompt",
        text="dice",  # cosine, jaccard, exact, or "embedding": by the policy's own embedding table
        features=256,  # hashed text features
        max_tool_steps=6,  # of a rollout, at least rollout.max_turns
        # What TAPO must beat: "shuffled" corrections, "zero_tools" (no tool step of a failure is punished).
        control="none",
        chunks=1,  # parts of the batch's questions whose pairs of steps are in memory at one time
        # Beyond the paper, off: a theta for each tool that follows the quantile of similarities between its witnesses …
        adaptive_theta=False, adaptive_quantile=0.8, adaptive_rate=0.05,
        # … and witnesses of the same question in the last memory_steps steps, each step of age discounting their
        # weight.
        memory_steps=0, memory_size=4, memory_discount=0.9,
    ))  # fmt: skip
    c.optimizer = ConfigDict(dict(
        lr=4e-4, schedule="constant", warmup_steps=5, b1=0.9, b2=0.95, weight_decay=0.0, grad_clip=1.0,
        vision_lr_multiplier=1.0,
    ))  # fmt: skip
    c.train = ConfigDict(dict(
        updates_per_batch=2,
        micro_batches=1,  # min parts of a mini-batch, computed one after another
        max_nonfinite=5,  # updates in a row without a finite loss and gradient, after which the run ends
        # Tokens and patches to which a part is padded: the fewest that hold its rows (shortest rows first). The largest
        # possible is added.
        length_buckets=(448,), patch_buckets=(),
        warm_up=True,  # compile all that a step runs before the first one
    ))  # fmt: skip
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the rest of the devices
    # every: steps; minutes: a further save whenever so many have passed, also within a rollout; 0: none.
    c.checkpoint = ConfigDict(dict(every=10, minutes=0.0, keep=2))
    c.export = ConfigDict(dict(dtype=""))  # of the trained model's files: "float32", "bfloat16"; "": that of model.path
    c.log = ConfigDict(dict(
        episodes_every=20, tensorboard=True,
        progress_s=30.0,  # seconds between two lines about the episodes of a rollout, and before the first; 0: none
        late_s=60.0,  # seconds that some processes wait for others before it is said which are late; 0: never
        profile_steps=(),  # the first and the last step that the profiler traces, into WORKDIR/profile; (): none
    ))  # fmt: skip
    c.compilation_cache = ""  # of compiled programs: "" is in the user's cache folder, "off", a folder or gs://…
    c.eval = ConfigDict(dict(
        split="held_out", prompts=128, every=0, at_start=True, at_end=True, temperature=1.0, top_p=1.0,
        # Only evaluations have these: the trainer cannot reproduce them. Tokens that may be drawn, 0: all; the least
        # probability of a token as a share of the most probable one's, 0: none; taken from the logits of the tokens
        # that a turn holds already, 0: nothing.
        top_k=0, min_p=0.0, presence_penalty=0.0,
        # Another judge for evaluations; without an endpoint it is that of the reward.
        judge=ConfigDict(dict(
            endpoint="",  # "": that of reward.judge, with all its fields
            model="",  # as in reward.judge
            key_variable="JUDGE_API_KEY",  # as in reward.judge
            concurrency=64,  # as in reward.judge
            timeout_s=60.0,  # as in reward.judge
            retries=5,  # as in reward.judge
            max_failed=0.05,  # as in reward.judge
            cache="",  # as in reward.judge
        )),
    ))  # fmt: skip
    c.benchmarks = ConfigDict(dict(
        # Folders of published benchmarks; launch/eval.py evaluates all in one run (configs/benchmarks.py); "": none.
        mmsearch="", hr_mmsearch="", fvqa_test="", infoseek="", simplevqa="", livevqa="", mat_search="",
        limit=0,  # > 0: only the first so many questions of each benchmark, for a first look
    ))  # fmt: skip

    if a.band:
        c.model.path = "atlas_band"
        c.data.outlines = 1
        c.data.mix.update(open=0.1, continent=0.4, position=0.4, border=0.1)
    if a.test:
        c.data.update(prompts_per_step=4, sizes=(32, 16), outlines=2)
        c.rollout.update(
            group_size=4, slots=16, max_turns=4, max_new_tokens=48, max_length=320, max_image_tokens=0, decode_chunk=8
        )
        c.tapo.max_tool_steps = 4
        c.train.update(length_buckets=(), patch_buckets=(320,), warm_up=False)
        c.optimizer.warmup_steps = 0
        c.checkpoint.every = 2
        c.log.update(episodes_every=2, tensorboard=False)
        c.eval.prompts = 8
    for size in SIZES:
        if a[size]:
            beside(__file__, "recipes.py", "apply")(c, size.removeprefix("qwen3_vl_"))
    return c
