"""Every recipe of configs/ is trainable as it stands: it builds, and takes two steps on data of its format."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import DEV, TRAIN, captions_of, fit, save_picture, write_table

from captioner import Captioner
from captioner.config import DECODER_CONFIGS, ModelConfig, SearchDefaults

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*WeightAveraging", "ignore:(?s).*serialize")
ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
SPLITS = ["train"] * TRAIN + ["val"] * DEV


def write_flickr8k(root):
    for index in range(TRAIN + DEV):
        save_picture(root / "Images" / f"{index}.jpg", index)
    lines = [f"{i}.jpg#{k}\t{text}" for i in range(TRAIN + DEV) for k, text in enumerate(captions_of(i))]
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, names in (("train", range(TRAIN)), ("dev", range(TRAIN, TRAIN + DEV))):
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}.jpg\n" for name in names))


def write_karpathy(root, file, folders):
    images = []
    for index, split in enumerate(SPLITS):
        folder = folders[split]
        save_picture(root / folder / f"{index}.jpg", index)
        image = {"filename": f"{index}.jpg", "split": split, "imgid": index}
        image["sentences"] = [{"raw": text} for text in captions_of(index)]
        images.append(image | ({"filepath": folder} if len(set(folders.values())) > 1 else {}))
    (root / file).write_text(json.dumps({"images": images}))


def write_coco(root):
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        chosen = [index for index, name in enumerate(SPLITS) if name == split]
        for index in chosen:
            save_picture(root / f"{split}2017" / f"{index:012}.jpg", index)
        content = {
            "images": [{"id": index, "file_name": f"{index:012}.jpg"} for index in chosen],
            "annotations": [
                {"image_id": i, "id": 9 * i + k, "caption": text}
                for i in chosen
                for k, text in enumerate(captions_of(i))
            ],
        }
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


def write_extra(root):
    """A table whose pictures have names of their own."""
    rows = ["image,caption,split"]
    for index, split in enumerate(["train"] * 4 + ["dev"]):
        save_picture(root / f"more-{index}.jpg", index)
        rows += [f"more-{index}.jpg,{text},{split}" for text in captions_of(index)]
    (root / "captions.csv").write_text("\n".join(rows) + "\n")
    return root


WRITERS = {
    "finetune": write_table,
    "flickr30k": lambda root: write_karpathy(root, "dataset_flickr30k.json", dict.fromkeys(SPLITS, "flickr30k-images")),
    "coco": write_coco,
    "coco_scst": lambda root: write_karpathy(root, "dataset_coco.json", {"train": "train2014", "val": "val2014"}),
}


def small(name, root, folder):
    """A recipe with what a test needs: random weights, small pictures and batches, every word learned."""
    settings = yaml.safe_load(CONFIGS[name].read_text())
    settings["trainer"] |= {
        "accelerator": "cpu",
        "fast_dev_run": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    settings["data"] |= {"root": str(root), "batch_size": 2, "workers": 0, "min_count": 1}
    settings["data"]["cache_folder"] = str(folder / "cache")
    if "extra" in settings["data"]:
        settings["data"]["extra"] |= {"root": str(write_extra(folder / "extra")), "images": None}
    if settings["model"].get("init_from"):
        settings["model"]["init_from"] = "bundled"
    else:
        settings["model"]["encoder_weights"] = None
        settings["data"]["preprocessing"] = {"side_px": 64}
        for stage in settings["model"]["stages"]:
            if "side_px" in stage:
                stage["side_px"] = 32
    return settings


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    def make(name):
        root = tmp_path_factory.mktemp(name) / "data"
        WRITERS.get(name, write_flickr8k)(root)
        return root

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_takes_two_steps_on_data_of_its_format(name, data_of, tmp_path):
    torch.manual_seed(0)
    assert fit(tmp_path, small(name, data_of(name), tmp_path)) == 0


@pytest.mark.parametrize("stage", range(3))
def test_each_stage_of_the_three_takes_two_steps(stage, data_of, tmp_path):
    settings = small("flickr8k", data_of("flickr8k"), tmp_path)
    settings["model"]["stages"] = [settings["model"]["stages"][stage]]
    assert fit(tmp_path, settings) == 0


def test_the_recipes_of_the_decoders_differ_in_the_decoder_and_how_long_and_fast_it_learns_at_first():
    recipes = [yaml.safe_load(CONFIGS[name].read_text()) for name in DECODER_CONFIGS]
    for settings in recipes:
        del settings["model"]["decoder"], settings["model"]["decoder_settings"], settings["trainer"]["default_root_dir"]
        for stage in settings["model"]["stages"]:
            stage.pop("attention_regularisation", None)  # there is none to regularise in `mean`
        for name in ("epochs", "learning_rate", "final_share"):
            del settings["model"]["stages"][0][name]
    assert recipes[0] == recipes[1] == recipes[2]


def test_the_recipe_of_the_bundled_model_has_its_shape():
    settings, bundled = yaml.safe_load(CONFIGS["bundled"].read_text()), Captioner.load(device="cpu").config
    given = {
        "decoder": settings["model"]["decoder"],
        "decoder_settings": settings["model"]["decoder_settings"],
        "encoder": settings["model"]["encoder"],
        "preprocessing": settings["data"]["preprocessing"],
        "max_tokens": settings["data"]["max_tokens"],
        "vocabulary_size": bundled.vocabulary_size,
    }
    assert ModelConfig.from_dict(given) == dataclasses.replace(bundled, search=SearchDefaults(), confidence=None)


def test_one_command_makes_a_model_of_own_photos(data_of, tmp_path, monkeypatch):
    from captioner.metrics import java

    monkeypatch.setattr(java, "missing", lambda metric: "left out")  # METEOR takes its time
    root = data_of("finetune")
    settings = small("finetune", root, tmp_path)
    settings["trainer"]["fast_dev_run"] = False
    settings["model"]["stages"][0]["epochs"] = 1
    assert fit(tmp_path, settings, "--export", tmp_path / "model") == 0
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.tokenizer.knows("circle")  # a new word
    assert captioner.tokenizer.vocabulary_size > Captioner.load(device="cpu").tokenizer.vocabulary_size
    assert captioner.caption(root / "0.jpg").text
    assert "recipe.yaml" in captioner.card  # the command
