from tests.http.fakes import a_job


def test_the_process_answers_as_long_as_it_can(get, view):
    view.not_ready = ("no shard has joined",)
    for path in ("/healthz", "/livez"):
        assert get(path).json() == {"status": "ok", "version": "0.1.0"}


def test_readiness_says_what_it_waits_for(get, view):
    assert (get("/readyz").status_code, get("/readyz").json()["ready"]) == (200, True)
    view.not_ready = ("1 of 2 shards has joined", "no registry")
    answer = get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reasons": ["1 of 2 shards has joined", "no registry"]}


def test_metrics_show_the_coordinator_at_the_moment_of_the_scrape(get, view):
    assert 'adashard_global_step{job_name="demo"} 41.0' in get("/metrics").text
    view.jobs = [a_job("other", version=7)]
    text = get("/metrics").text
    assert 'adashard_global_step{job_name="other"} 7.0' in text
    assert "demo" not in text.split("adashard_workers")[0]


def test_prometheus_gets_the_format_it_asks_for(get):
    assert get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
