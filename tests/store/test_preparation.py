"""The preparer's claims: one holder at a time, free again when the lease has run out."""

from core.records import TokenCounts
from core.spec import JobSpec
from store import jobs, preparation
from store.db import Database
from store.tables import DEFAULT_PROJECT, Dataset


def upload(database: Database) -> str:
    with database.transaction() as session:
        facts = {"name": "d", "filename": "d", "bytes": 1, "sha256": "s", "status": "uploaded"}
        session.add(Dataset(id="ds_cccccccccccc", project_id=DEFAULT_PROJECT, **facts))
    return "ds_cccccccccccc"


def test_an_upload_has_one_holder_until_its_lease_has_run_out(database: Database) -> None:
    dataset_id = upload(database)
    with database.transaction() as session:
        first = preparation.claim_dataset(session, dataset_id, boot_id="a", lease_seconds=60)
        assert preparation.claim_dataset(session, dataset_id, boot_id="b", lease_seconds=60) is None
    assert first is not None
    with database.transaction() as session:
        assert preparation.renew_dataset(session, first, lease_seconds=-1)
    with database.transaction() as session:
        second = preparation.claim_dataset(session, dataset_id, boot_id="b", lease_seconds=60)
    assert second is not None
    assert second.tries == 2
    with database.transaction() as session:
        assert not preparation.renew_dataset(session, first, lease_seconds=60)
        preparation.release_dataset(session, first, counted=False)
        assert session.get(Dataset, dataset_id).owner == "b", "a stale holder gives nothing back"


def test_a_deleted_upload_is_not_taken(database: Database) -> None:
    dataset_id = upload(database)
    with database.transaction() as session:
        row = session.get(Dataset, dataset_id)
        row.deleted_at = row.created_at
        session.flush()
        assert preparation.claim_dataset(session, dataset_id, boot_id="a", lease_seconds=60) is None


def test_a_job_over_pictures_lacks_both_caches_until_both_are_recorded(database: Database) -> None:
    dataset_id = upload(database)
    spec = JobSpec.model_validate(
        {"task": "contrastive", "base_model": "clip", "data": {"datasets": [{"dataset_id": dataset_id}]}}
    )
    counts = TokenCounts(
        dataset_id=dataset_id,
        rows=2,
        examples=2,
        tokens=8,
        trained_tokens=4,
        truncated_rows=0,
        rows_without_target=0,
        longest=4,
    )

    def missing() -> list[str]:
        with database.transaction() as session:
            job, _ = jobs.create_job(
                session, DEFAULT_PROJECT, spec, dataset_digests={dataset_id: "s"}, tokenizer="t", processor="p"
            )
            claim = preparation.claim_job(session, job.id, boot_id="a", lease_seconds=60)
            if claim is None:
                assert job.status == "queued"
                return []
            assert isinstance(claim, preparation.JobClaim)
            kinds = [cache.kind for cache in claim.missing]
            for cache in claim.missing[:1]:
                if cache.kind == "tokens":
                    preparation.record_tokens(session, claim, cache, counts)
                else:
                    preparation.record_pictures(session, claim, cache)
            return kinds

    with database.transaction() as session:
        session.get(Dataset, dataset_id).status = "ready"
    assert [missing(), missing(), missing()] == [["tokens", "pictures"], ["pictures"], []]
