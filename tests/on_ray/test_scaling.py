"""Both pools grow and shrink under streams: nothing fails, no token changes, and nobody who left is left over."""

import asyncio
import contextlib

import psutil
import pytest

from tests.on_ray.scaling_story import left, undisturbed_and_with
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tiny, tmp_path_factory):
    with Served(tiny, "--expert-workers", "1", log=tmp_path_factory.mktemp("scaling") / "log") as served:
        yield served


def test_pools_scale_up_and_down_under_streams_that_do_not_notice(cluster):
    """1 to 3 to 1 expert workers and 1 to 2 to 1 attention workers, both at once, under 12 streams."""
    before = cluster.status()
    calm, scaled = asyncio.run(undisturbed_and_with(cluster, [(2, 3), (1, 1)], num_clients=12, max_tokens=80))
    print(f"longest gap: {calm.longest_gap_s:.3f} s undisturbed, {scaled.longest_gap_s:.3f} s while scaled")
    commits = [w["gauges"]["commit_seconds_max"] for w in cluster.status()["workers"] if w["role"] == "attention"]
    print(f"{scaled.answers} answers; longest commit: {1000 * max(commits):.2f} ms")
    assert scaled.answers >= 24
    assert not scaled.different
    status = cluster.status()
    assert [(w["id"], w["incarnation"], w["pid"]) for w in status["workers"]] == [
        (w["id"], w["incarnation"], w["pid"]) for w in before["workers"]
    ]
    assert not status["failures"]
    assert status["epoch"]["number"] >= before["epoch"]["number"] + 2
    while num_workers(cluster) > 2:  # who has left ends a moment later; the test's own time limit bounds it
        continue
    assert left(cluster)["worker_segments"] > 0


def num_workers(cluster):
    """Living processes of either pool."""
    titles = []
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            titles += process.cmdline()[:1]  # a zombie's is empty
    return sum("ray::AttentionActor" in title or "ray::ExpertActor" in title for title in titles)


def test_a_worker_drained_by_name_is_not_replaced_and_a_new_controller_knows(cluster):
    """The size of a pool survives the controller."""
    answer = cluster.client.post("/v1/admin/scale", json={"experts": 2})
    assert answer.status_code == 200, answer.text
    cluster.wait_for_status(lambda s: s["pools"]["expert"] == {"wanted": 2, "ready": 2, "leaving": 0}, 60)
    assert cluster.client.post("/v1/admin/drain", json={"worker": "expert-0"}).status_code == 200
    cluster.wait_for_status(lambda s: s["pools"]["expert"] == {"wanted": 1, "ready": 1, "leaving": 0}, 60)
    before = cluster.status()
    assert [w["id"] for w in before["workers"]] == ["attention-0", "expert-1"]
    controller = psutil.Process(before["controller"]["pid"])
    controller.kill()
    controller.wait()
    cluster.wait_until_ready()
    while (answer := cluster.client.get("/v1/admin/status")).status_code == 503:
        continue  # each answer takes as long as the gateway tries
    cluster.wait_for_status(lambda s: s["phase"] == "ready" and s["term"] == before["term"] + 1, 60)
    assert [(w["id"], w["pid"]) for w in cluster.status()["workers"]] == [
        (w["id"], w["pid"]) for w in before["workers"]
    ]
    cluster.complete([3, 4, 5], max_tokens=4)
