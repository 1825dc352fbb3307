from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtl.engines import hosting, ray_cluster
from fedtl.errors import EnvironmentFault, InputError


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_cluster.Cluster]:
    made = ray_cluster.join(num_cpus=2)
    yield made
    made.leave()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[object, str]]:
    """Somebody's cluster of two machines, and its address."""
    from ray.cluster_utils import Cluster

    here = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    handler = signal.getsignal(signal.SIGTERM)
    with hosting.scratch_folder("cluster") as place:
        head = {**here, "include_dashboard": False, "temp_dir": str(place)}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(**here)
        signal.signal(signal.SIGTERM, handler)  # the cluster has set its own
        yield made, made.address
        made.shutdown()


def script(text: str, place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (place / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, "script.py"], cwd=place, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_line_does_not_import_ray(tmp_path: Path) -> None:
    done = script("import sys, fedtl.cli; sys.exit('ray' in sys.modules)", tmp_path)
    assert done.returncode == 0


def test_a_signal_is_not_followed_by_an_alarm(tmp_path: Path) -> None:
    text = """
import os, signal
from fedtl.engines import ray_cluster
from fedtl.interrupts import Interrupts

with Interrupts() as interrupts:
    cluster = ray_cluster.join(num_cpus=1)
    os.kill(os.getpid(), signal.SIGTERM)
    left = signal.alarm(0)
    cluster.leave()
    raise SystemExit(f"{left} seconds left" if left else 0)
"""
    done = script(text, tmp_path, PYTHONPATH=str(Path(ray_cluster.__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    assert "SIGTERM received" not in done.stderr


def test_workers_import_the_same_fedtl_when_it_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "fedtl").symlink_to(Path(ray_cluster.__file__).parents[1])
    text = """
import ray
import fedtl
from fedtl.engines import ray_cluster

cluster = ray_cluster.join(num_cpus=1)

def where():
    import fedtl
    return fedtl.__file__

print(fedtl.__file__, ray.get(ray.remote(where).remote()))
cluster.leave()
"""
    done = script(text, tmp_path)
    assert done.returncode == 0, done.stderr
    here = str(tmp_path / "fedtl" / "__init__.py")
    assert done.stdout.split() == [here, here]
    assert done.stderr == ""


def test_it_can_be_started_again_and_leaves_nothing(tmp_path: Path) -> None:
    text = """
import os
import subprocess
from fedtl.engines import ray_cluster

for _ in range(2):
    cluster = ray_cluster.join(num_cpus=1)
    cluster.leave()
    cluster.leave()
    assert "died" in cluster.trouble()
    name = "/tmp/fedtl-run-" + ray_cluster._folder_name()
    assert not os.path.exists(name), os.listdir(name)
    left = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True)
    assert left.stdout.count(b"\\n") == 1, left.stdout  # ps itself
"""
    done = script(text, tmp_path, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_running_cluster_is_joined_and_left_running(running) -> None:
    _, address = running
    for _ in range(2):
        joined = ray_cluster.join(address)
        assert (joined.ours, joined.num_cpus) == (False, 2)
        joined.leave()
        assert joined.trouble() is None


@pytest.mark.parametrize(
    "address", ["x", "auto", "10.0.0.1", "ray://10.0.0.1:10001", "10.0.0.1:99999", "a:b", ":1", ""]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="not the address of a Ray cluster"):
        ray_cluster.join(address)


def test_where_nobody_listens_no_time_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentFault, match=f"no Ray cluster answers.*{port}.*refused"):
        ray_cluster.join(f"127.0.0.1:{port}")


def test_what_is_not_ray_is_told_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "HEALTH_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EnvironmentFault, match="what listens there is no Ray"):
            ray_cluster.join(f"127.0.0.1:{port}")


def test_ray_that_cannot_start_is_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**arguments: object) -> None:
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(EnvironmentFault, match=r"Ray does not start \(got no room\)"):
        ray_cluster.join(num_cpus=1)
    assert not Path("/tmp/fedtl-run-" + ray_cluster._folder_name()).exists()


# From here on this process is connected to a Ray of its own.


def test_it_has_what_was_asked_for(cluster) -> None:
    assert (cluster.ours, cluster.num_cpus, cluster.num_gpus) == (True, 2, 0.0)
    assert cluster.trouble() is None


def test_it_listens_on_the_loopback_only(cluster) -> None:
    import ray

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        outward = probe.getsockname()[0]
    node = ray._private.worker.global_worker.node
    for port in (int(node.gcs_address.rpartition(":")[2]), node.node_manager_port):
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((outward, port), 5)


def test_signals_stay_ours_and_those_to_our_group_do_not_reach_it(cluster, descendants) -> None:
    import ray

    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    parts = ray._private.worker.global_worker.node.all_processes
    began = [one.process.pid for kind in parts.values() for one in kind]
    assert len(began) > 2
    (raylet,) = parts["raylet"]
    below = descendants(raylet.process.pid)
    assert below
    assert os.getpgrp() not in {os.getpgid(child) for child in [*began, *below]}


def test_a_second_uses_the_first_and_leaves_it_running(cluster) -> None:
    second = ray_cluster.join(num_cpus=1)
    assert (second.ours, second.num_cpus) == (False, 2)
    second.leave()
    assert cluster.trouble() is None


def test_this_process_is_no_worker_and_a_task_runs_in_one(cluster) -> None:
    import ray

    assert not ray_cluster.in_worker()
    assert ray.get(ray.remote(ray_cluster.in_worker).remote())
