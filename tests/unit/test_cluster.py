from higgs_tune import cluster


def test_only_a_cluster_that_was_started_for_sharing_is_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster.head_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert cluster.head_address() == "10.0.0.1:6379"
