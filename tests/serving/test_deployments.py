"""From `deployed` in the record to routable, and every reason not to be."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from core.adapter import PARITY_FILE, ParityRecordV1
from store.tables import DEFAULT_PROJECT, Endpoint
from tests.serving.conftest import OTHER_PROJECT, Service, running, wait_for

WEIGHTS = "adapter_model.safetensors"


def test_a_deployed_version_answers_without_a_restart_and_its_receipts_stand_first(service: Service) -> None:
    published = service.publish(1)
    assert service.ask("pirate").status_code == 404
    service.deploy(published)
    service.wait_routable("pirate")
    receipts = {receipt.check: receipt for receipt in service.receipts(published)}
    assert list(receipts) == ["manifest", "base_identity", "load", "template", "parity", "effect"]
    assert all(receipt.passed for receipt in receipts.values())
    assert receipts["parity"].numbers["mean_abs_difference"] < 1e-5
    assert receipts["parity"].numbers["tokens"] == 10
    assert receipts["effect"].numbers["effect"] > 0.1
    assert receipts["parity"].endpoint_name == service.settings.endpoint_name
    assert service.ask("pirate").json()["text"] != service.ask("tiny").json()["text"]


def test_several_adapters_over_one_base_answer_each_in_its_own_way(service: Service) -> None:
    for seed, name in ((1, "one"), (2, "two")):
        service.deploy(service.publish(seed, name=name))
    full = service.publish(3, name="whole", tuning="full")
    service.deploy(full)
    for name in ("one", "two", "whole"):
        service.wait_routable(name)

    def answer(name: str) -> tuple[float, ...]:
        # Log-probabilities tell what texts may hide: every untrained tiny model repeats the prompt's last token. The second
        # time the prompt's beginning is in memory, and sums are added up in another order.
        return tuple(round(value, 4) for value in service.ask(name, logprobs=True).json()["logprobs"])

    names = ("tiny", "one", "two", "whole")
    answers = {name: answer(name) for name in names}
    assert len(set(answers.values())) == 4
    for name in reversed(names):
        assert answer(name) == answers[name]


def test_names_versions_and_ids_resolve_and_the_latest_deployed_version_wins(service: Service) -> None:
    first, second, third = (service.publish(seed) for seed in (1, 2, 4))
    for published in (first, second):
        service.deploy(published)
    service.wait_routable("pirate@2")
    service.wait_routable("pirate@1")
    assert service.models() == ["tiny", "tiny:fp32", "pirate", "pirate@1", "pirate@2"]

    def answering(name: str) -> str:
        return service.ask(name).json()["model"]

    assert answering("pirate") == answering(first.adapter_id) == "pirate@2"
    assert answering("pirate@1") == answering(f"{first.adapter_id}@1") == "pirate@1"
    assert answering("tiny:fp32") == "tiny:fp32"
    assert service.ask("pirate@3").json()["error"]["code"] == "model_not_found"
    service.deploy(third)
    service.wait_routable("pirate@3")
    assert answering("pirate") == "pirate@3"
    service.undeploy(third)
    wait_for(lambda: "pirate@3" not in service.models())
    assert answering("pirate") == "pirate@2"


def test_another_projects_adapter_is_not_there_at_all(service: Service) -> None:
    service.deploy(service.publish(1, name="secret", project=OTHER_PROJECT), OTHER_PROJECT)
    service.wait_routable("secret", service.other_key)
    assert service.models() == ["tiny", "tiny:fp32"]
    hidden, missing = service.ask("secret").json()["error"], service.ask("absent").json()["error"]
    assert hidden == {**missing, "message": missing["message"].replace("absent", "secret")}
    assert service.ask("secret", key=service.other_key).status_code == 200


def test_an_undeployed_adapter_leaves_after_the_running_answer(service: Service) -> None:
    published = service.publish(1)
    service.deploy(published)
    service.wait_routable("pirate")
    host = service.app.state.serving.directory.bases[0].host
    whole = service.ask("pirate", max_tokens=400, temperature=1.0, seed=2, stop=None).json()["text"]
    body = {"model": "pirate", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_tokens": 400, "temperature": 1.0, "seed": 2, "stream": True}
    with service.client.stream("POST", "/generate", json=body, headers=service.bearer()) as response:
        lines = response.iter_lines()
        first = next(lines)
        service.undeploy(published)
        datas = [line.removeprefix("data: ") for line in [first, *lines] if line]
    assert datas[-1] == "[DONE]"
    assert "".join(json.loads(data)["text"] for data in datas[:-1]) == whole
    wait_for(lambda: "pirate" not in service.models())
    wait_for(lambda: not hasattr(host.model, "peft_config"))
    assert service.ask("pirate").status_code == 404
    service.deploy(published)
    service.wait_routable("pirate")


def test_an_adapter_of_another_base_is_refused_and_both_are_named(service: Service) -> None:
    for number, base in enumerate(({"weights": "f" * 64}, {"quantization": "nf4"}, {"compute_dtype": "bf16"})):
        published = service.publish(number, name=f"stranger{number}", base=base)
        service.deploy(published)
        receipt = service.failed_receipt(published)
        assert receipt.check == "base_identity"
        assert receipt.numbers["trained_on"] == receipt.numbers["trained_on"] | base
        assert receipt.numbers["served"][0]["weights"] == service.weights
        assert f"weights {service.weights[:12]}, quantization none, compute fp32" in receipt.numbers["reason"]
        wait_for(lambda name=f"stranger{number}": service.ask(name).status_code == 404)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapter_tensors_that_match_nothing_are_refused(service: Service) -> None:
    def move(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    published = service.publish(1, change=move)
    service.deploy(published)
    receipt = service.failed_receipt(published)
    assert receipt.check == "load"
    assert "model.layers.7" in receipt.numbers["reason"]
    assert "names no module of the model" in receipt.numbers["reason"]
    assert "pirate" not in service.models()


def test_a_corrupted_file_is_refused(service: Service) -> None:
    published = service.publish(1)
    path = published.folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    service.deploy(published)
    receipt = service.failed_receipt(published)
    assert receipt.check == "manifest"
    assert "content differs" in receipt.numbers["reason"]


def test_another_folder_under_the_versions_key_is_refused(service: Service) -> None:
    published, other = service.publish(1), service.publish(2, name="other")
    shutil.rmtree(published.folder)
    shutil.copytree(other.folder, published.folder)
    service.deploy(published)
    receipt = service.failed_receipt(published)
    assert receipt.check == "manifest"
    assert "digest" in receipt.numbers["reason"]


def test_missing_files_are_refused_and_a_new_wish_is_tried_again(service: Service) -> None:
    published = service.publish(1)
    aside = published.folder.rename(published.folder.with_name("aside"))
    service.deploy(published)
    assert service.failed_receipt(published).check == "files"
    aside.rename(published.folder)
    service.deploy(published)
    service.wait_routable("pirate")


def test_an_adapter_that_does_nothing_is_refused(service: Service) -> None:
    def claim_effect(record: ParityRecordV1) -> ParityRecordV1:
        # Small enough to pass as parity: only the comparison with the base can tell.
        probe = record.probes[0]
        claimed = probe.model_copy(update={"logprobs": [value + 5e-4 for value in probe.base_logprobs]})
        return record.model_copy(update={"probes": [claimed]})

    published = service.publish(1, scale=0.0, parity=claim_effect)
    service.deploy(published)
    receipt = service.failed_receipt(published)
    assert receipt.check == "effect"
    assert receipt.numbers["effect"] == 0
    assert [row.check for row in service.receipts(published) if row.passed][-1] == "parity"


def test_a_parity_failure_is_recorded_with_its_numbers_once_and_not_routable(service: Service) -> None:
    def shift(record: ParityRecordV1) -> ParityRecordV1:
        probe = record.probes[0]
        return record.model_copy(
            update={"probes": [probe.model_copy(update={"logprobs": [value + 0.01 for value in probe.logprobs]})]}
        )

    published = service.publish(1, parity=shift)
    service.deploy(published)
    receipt = service.failed_receipt(published)
    assert receipt.check == "parity"
    assert 0.009 < receipt.numbers["mean_abs_difference"] < 0.011
    assert receipt.numbers["tolerance"] == 1e-3
    wait_for(lambda: service.ask("pirate").status_code == 404)
    count = len(service.receipts(published))
    service.deploy(service.publish(2, name="other"))
    service.wait_routable("other")  # the endpoint has looked at everything again
    assert len(service.receipts(published)) == count


def test_a_parity_record_that_can_not_be_read_or_run_is_refused(service: Service) -> None:
    def outside(record: ParityRecordV1) -> ParityRecordV1:
        probe = record.probes[0]
        ids = [*probe.token_ids[:-1], 10**6]
        return record.model_copy(update={"probes": [probe.model_copy(update={"token_ids": ids})]})

    def short(record: ParityRecordV1) -> ParityRecordV1:
        probe = record.probes[0]
        return record.model_copy(update={"probes": [probe.model_copy(update={"logprobs": probe.logprobs[1:]})]})

    spoiled = [
        service.publish(1, name="gone", change=lambda folder: (folder / PARITY_FILE).unlink()),
        service.publish(1, name="text", change=lambda folder: (folder / PARITY_FILE).write_text("no")),
        service.publish(1, name="outside", parity=outside),
        service.publish(1, name="short", parity=short),
    ]
    for published in spoiled:
        service.deploy(published)
        assert service.failed_receipt(published).check == "parity"
    assert service.models() == ["tiny", "tiny:fp32"]


def test_an_endpoint_shows_itself_and_finds_what_was_deployed_before_it_came(prepared: Service) -> None:
    prepared.deploy(prepared.publish(1))
    prepared.deploy(prepared.publish(2, name="other", project=OTHER_PROJECT), OTHER_PROJECT)
    with running(prepared) as service:
        assert "pirate" in service.models()
        assert "other" in service.models(service.other_key)
        with service.database.transaction() as session:
            (row,) = session.query(Endpoint)
    assert row.name == service.settings.endpoint_name
    assert row.bases == [{"model": "tiny", "weights": service.weights, "quantization": "none", "compute_dtype": "fp32"}]
    assert DEFAULT_PROJECT != OTHER_PROJECT
