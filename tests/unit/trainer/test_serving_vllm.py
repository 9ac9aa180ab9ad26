"""How vLLM is started: what its command line and environment say, and what is refused before it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_bus import LIFELINE, ConfigError
from tests import fake_vllm
from trainer.config import ServeSection, replica_binds, replica_urls, scripted_url
from trainer.serving.serve import check_serving
from trainer.serving.vllm import PLUGIN_DIRECTORY, InstalledVllm, Launch, find_vllm, replica_devices, vllm_launch

CPU = InstalledVllm(Path("/venv/bin/python"), "0.32.0", cpu=True)
CUDA = InstalledVllm(Path("/venv/bin/python"), "0.32.0", cpu=False, devices=("0", "1", "2", "3"))


def section(**keys: object) -> ServeSection:
    return ServeSection(engine="vllm", **keys)  # pyright: ignore[reportArgumentType]


def launch(
    serve: ServeSection, installed: InstalledVllm = CPU, *, replica: int = 0, environ: dict[str, str] | None = None
) -> Launch:
    return vllm_launch(serve, Path("/m"), name="policy", installed=installed, replica=replica, seed=5, environ=environ or {})  # fmt: skip


def after(argv: list[str], flag: str) -> str:
    """The value of a flag; the last counts, as it does for vLLM."""
    return argv[len(argv) - argv[::-1].index(flag)]


def test_vllm_is_started_with_everything_that_the_ring_relies_on() -> None:
    argv = launch(section()).argv
    assert argv[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert {"--enable-scale-out", "--enable-prefix-caching"} <= set(argv)
    assert after(argv, "--logprobs-mode") == "processed_logprobs"
    assert after(argv, "--generation-config") == "vllm"  # no top_k of the model's own behind the trainer's back
    assert after(argv, "--dtype") == "float32"
    assert [after(argv, flag) for flag in ("--model", "--served-model-name")] == ["/m", "policy"]
    assert [after(argv, flag) for flag in ("--host", "--port")] == ["127.0.0.1", "4752"]
    assert launch(section()).environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    ("transfer", "backend"), [("shm", "lightning_shm"), ("file", "lightning_shm"), ("nccl", "nccl")]
)
def test_the_transfer_decides_who_takes_weights_in(transfer: str, backend: str) -> None:
    argv = launch(section(transfer=transfer), CUDA).argv
    assert json.loads(after(argv, "--weight-transfer-config")) == {"backend": backend}


def test_tools_reasoning_and_sizes_pass_through() -> None:
    argv = launch(
        section(tool_parser="qwen3_xml", reasoning_parser="qwen3", context_tokens=512, slots_max=7, data_parallel=2, tensor_parallel=2),
        CUDA,
    ).argv  # fmt: skip
    wanted = {
        "--tool-call-parser": "qwen3_xml", "--reasoning-parser": "qwen3", "--max-model-len": "512",
        "--max-num-seqs": "7", "--data-parallel-size": "2", "--tensor-parallel-size": "2",
    }  # fmt: skip
    assert {flag: after(argv, flag) for flag in wanted} == wanted
    assert "--enable-auto-tool-choice" in argv
    plain = launch(section(tool_parser="")).argv
    assert not {"--enable-auto-tool-choice", "--tool-call-parser", "--max-model-len", "--data-parallel-size"} & set(
        plain
    )


def test_adapters_get_the_next_rank_that_vllm_knows_and_may_change_while_it_runs() -> None:
    started = launch(section(lora_rank_max=12))
    assert after(started.argv, "--max-lora-rank") == "16"
    assert started.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "--enable-lora" not in launch(section()).argv
    with pytest.raises(ConfigError, match="lora_rank_max = 1000 is more than vLLM serves, which is 512"):
        launch(section(lora_rank_max=1000))


def test_what_the_user_adds_wins() -> None:
    assert after(launch(section(arguments=["--dtype", "auto"])).argv, "--dtype") == "auto"


def test_on_a_cpu_it_leaves_the_trainers_core_alone() -> None:
    started = launch(section(torch_threads=2, cache_bytes=3 << 30))
    assert "--enforce-eager" in started.argv
    assert started.environment.items() >= {
        "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
    }.items()  # fmt: skip
    cuda = launch(section(), CUDA)
    assert "--enforce-eager" not in cuda.argv
    assert not [key for key in cuda.environment if "CPU" in key or "OMP" in key]


def test_only_our_plugin_is_added_to_its_path_and_nothing_of_ours_leaks_into_it() -> None:
    ours = {"PYTHONPATH": "/ours", "PYTHONHOME": "/ours", "VIRTUAL_ENV": "/ours", LIFELINE: "1", "PATH": "/bin"}
    environment = launch(section(), environ=ours).environment
    assert environment["PYTHONPATH"] == str(PLUGIN_DIRECTORY)
    assert environment["PATH"] == "/bin"
    assert not {"PYTHONHOME", "VIRTUAL_ENV", LIFELINE} & environment.keys()
    assert "VLLM_PLUGINS" not in environment
    assert launch(section(), environ={"VLLM_PLUGINS": "theirs"}).environment["VLLM_PLUGINS"] == "theirs,lightning_bus"


def test_replicas_take_the_ports_that_follow_and_sample_differently() -> None:
    serve = section(replicas=3, bind="0.0.0.0:9000", devices=[1, 2, 3])
    assert replica_binds(serve) == ["0.0.0.0:9000", "0.0.0.0:9001", "0.0.0.0:9002"]
    assert replica_urls(serve) == [f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)]
    assert scripted_url(serve) == "http://127.0.0.1:9003"
    assert scripted_url(section(scripted_bind="10.0.0.1:80")) == "http://10.0.0.1:80"
    third = launch(serve, CUDA, replica=2)
    assert (third.url, after(third.argv, "--host"), after(third.argv, "--port")) == ("http://127.0.0.1:9002", "0.0.0.0", "9002")  # fmt: skip
    assert after(third.argv, "--seed") == "7"


@pytest.mark.parametrize("bind", ["4752", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:65536", "127.0.0.1:0"])
def test_an_address_that_is_none_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.bind: .* is not host:port"):
        replica_urls(section(bind=bind))
    with pytest.raises(ConfigError, match="would need port 65536"):
        replica_urls(section(bind="127.0.0.1:65535", replicas=2))


def test_each_replica_gets_gpus_of_its_own() -> None:
    visible = ("4", "5", "6", "7")
    assert replica_devices(section(replicas=2, tensor_parallel=2), visible) == [["4", "5"], ["6", "7"]]
    assert replica_devices(section(devices=[3, 1], replicas=2), visible) == [["7"], ["5"]]
    assert replica_devices(section(devices=[0, 0], replicas=2), visible) == [["4"], ["4"]]
    assert replica_devices(section(), ()) == [[]]  # the driver says nothing: vLLM will
    assert launch(section(devices=[2]), CUDA).environment["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(ConfigError, match="3 replicas × 2 GPUs each are 6 GPUs, and there are 4"):
        replica_devices(section(replicas=3, tensor_parallel=2), visible)
    with pytest.raises(ConfigError, match=r"serve\.devices = \[4\], but the GPUs here are 0 to 3"):
        replica_devices(section(devices=[4]), visible)


def test_a_python_without_a_vllm_that_we_know_is_refused_with_the_way_out(tmp_path: Path) -> None:
    assert find_vllm(section(python=str(fake_vllm.install(tmp_path)))).cpu
    with pytest.raises(ConfigError, match="has vLLM 0.31.2; its routes are known to us from 0.32 on. `make vllm`"):
        find_vllm(section(python=str(fake_vllm.install(tmp_path, version="0.31.2"))))
    with pytest.raises(
        ConfigError, match=r"serve\.python 'nowhere/python' is not there. `make vllm` makes an environment"
    ):
        find_vllm(section(python="nowhere/python"))
    with pytest.raises(ConfigError, match="is not a Python that works"):
        find_vllm(section(python="/bin/false"))
    with pytest.raises(ConfigError, match='"nccl" is for GPUs'):
        find_vllm(section(python=str(fake_vllm.install(tmp_path)), transfer="nccl"))


def test_the_plugin_lies_where_its_entry_point_is_found() -> None:
    (entries,) = PLUGIN_DIRECTORY.glob("*.dist-info/entry_points.txt")
    assert "lightning_bus = " in entries.read_text()
    names = {path.name for path in PLUGIN_DIRECTORY.iterdir()} - {"__pycache__"}
    assert names == {"lightning_bus_vllm.py", entries.parent.name}  # nothing else lands on vLLM's path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"replicas": 2}, "serve.replicas = 2 is for vLLM"),
        ({"dtype": "bfloat16"}, "serve.dtype = 'bfloat16' is for vLLM"),
        ({"arguments": ["--x"]}, "serve.arguments = .* is for vLLM"),
        ({"transfer": "nccl"}, '"nccl" is for vLLM on GPUs'),
    ],
)
def test_what_only_vllm_can_do_is_not_silently_left_out_by_the_embedded_engine(
    keys: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_serving(ServeSection(**keys))  # pyright: ignore[reportArgumentType]


def test_a_replica_that_the_gateway_does_not_know_is_refused() -> None:
    two = section(replicas=2, scripted={"teacher": "m:f"})
    everyone = ["http://gpu-host:4752", "http://gpu-host:4753", "http://gpu-host:4754"]
    check_serving(two, everyone)
    check_serving(ServeSection(scripted={"teacher": "m:f"}), ["http://127.0.0.1:4752"])
    with pytest.raises(ConfigError, match=r"upstreams does not name http://127\.0\.0\.1:4753, so"):
        check_serving(two, [everyone[0], everyone[2]])
    with pytest.raises(ConfigError, match=r"does not name http://127\.0\.0\.1:4754"):
        check_serving(two, everyone[:2])
