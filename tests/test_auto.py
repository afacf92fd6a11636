"""Registration with transformers: what resolves to what, and that nothing is imported before it is needed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, CLIPTextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import ov_segmentation
from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.auto import CLASS_MODULES, METHODS, load_class, register
from ov_segmentation.download_errors import LoadingError
from tests.mixins.pipeline import PipelineTesterMixin
from tests.models import test_san

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.model_type)
SOURCE = Path(ov_segmentation.__file__).parents[1]


def run(code):
    """Standard output of a fresh Python process with the package importable."""
    code = f"import sys\nsys.path.insert(0, {str(SOURCE)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---------------------------------------------------------------------- the table


@each_method
def test_names_lead_to_the_classes(method):
    config_class = load_class(method.config)
    assert config_class.model_type == method.model_type
    for name in (method.config, method.model, method.image_processor, method.processor):
        cls = getattr(ov_segmentation, name)
        assert cls.__name__ == name
        assert cls.__module__ == CLASS_MODULES[name]
        assert name in ov_segmentation.__all__
        assert name in dir(ov_segmentation)
    assert load_class(method.model).config_class is config_class


@each_method
def test_transformers_knows_the_method(method):
    config_class = load_class(method.config)
    assert type(AutoConfig.for_model(method.model_type)) is config_class
    assert PROCESSOR_MAPPING[config_class] is load_class(method.processor)
    backends = IMAGE_PROCESSOR_MAPPING[config_class]
    assert set(backends.values()) == {load_class(method.image_processor)}
    assert set(backends) == {"pil", "torchvision"}
    assert AutoModelForOpenVocabularySegmentation._model_mapping[config_class] is load_class(method.model)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "original.pth").write_bytes(b"")
    with pytest.raises(LoadingError, match=r"a checkpoint is a folder: `ov-segment doctor .*original\.pth`"):
        AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "original.pth")


def test_public_names():
    with pytest.raises(AttributeError, match="no attribute 'SEGFormer'"):
        _ = ov_segmentation.SEGFormer
    missing = [name for name in ov_segmentation.__all__ if not hasattr(ov_segmentation, name)]
    assert missing == []


# ---------------------------------------------------------------------- resolving


class SAN(test_san.TestSAN, PipelineTesterMixin):
    """Just its model and processor."""

    __test__ = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("san")
    model, processor = SAN.parts()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_auto_classes_resolve_a_folder(folder):
    assert type(AutoConfig.from_pretrained(folder)) is ov_segmentation.SANConfig
    assert type(AutoProcessor.from_pretrained(folder)) is ov_segmentation.SANProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is ov_segmentation.SANImageProcessor
    for auto in (AutoModel, AutoModelForOpenVocabularySegmentation):
        assert type(auto.from_pretrained(folder)) is ov_segmentation.SANForOpenVocabularySegmentation
        config = AutoConfig.from_pretrained(folder)
        assert type(auto.from_config(config)) is ov_segmentation.SANForOpenVocabularySegmentation


def test_other_models_are_refused_and_left_alone():
    with pytest.raises(ValueError, match=r"CLIPTextConfig.*AutoModelForOpenVocabularySegmentation"):
        AutoModelForOpenVocabularySegmentation.from_config(CLIPTextConfig())
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = CLIPTextConfig(**small, vocab_size=8, bos_token_id=6, eos_token_id=7, pad_token_id=0)
    assert type(AutoModel.from_config(text)).__name__ == "CLIPTextModel"


def test_registering_again_changes_nothing(recwarn):
    register()
    assert not recwarn.list
    assert type(AutoConfig.for_model("san")) is ov_segmentation.SANConfig


def test_a_model_type_that_transformers_has_itself_gives_a_warning_and_ours_wins(monkeypatch, folder):
    monkeypatch.setitem(CONFIG_MAPPING_NAMES, "san", "SanConfig")
    monkeypatch.setitem(MODEL_MAPPING_NAMES, "san", "SanModel")
    with pytest.warns(UserWarning, match=r"a model type 'san' \(SanConfig\) of its own.*ov_segmentation's SAN"):
        register()
    assert type(AutoConfig.from_pretrained(folder)) is ov_segmentation.SANConfig
    assert type(AutoModel.from_pretrained(folder)) is ov_segmentation.SANForOpenVocabularySegmentation
    assert type(AutoProcessor.from_pretrained(folder)) is ov_segmentation.SANProcessor


# ---------------------------------------------------------------------- a fresh process


def test_import_is_quiet_and_light_and_models_wait_until_asked_for(folder):
    seconds, heavy, *loaded = run(
        f"""
        import time, warnings
        import transformers, transformers.models.auto, transformers.pipelines
        before = set(sys.modules)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            import ov_segmentation
        seconds = time.process_time() - start
        optional = {{"datasets", "accelerate", "evaluate", "scipy", "torchvision", "pandas", "yaml", "tensorboard"}}
        print(seconds, ",".join(optional & (set(sys.modules) - before)) or "-")

        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

        def report():
            modules = [name.rpartition(".")[2] for name in sys.modules if name.startswith("ov_segmentation.models.")]
            models = [name for name in modules if name.startswith("modeling_")]
            print(*models, "CLIP" if "transformers.models.clip.modeling_clip" in sys.modules else "-", sep="+")

        report()
        config = AutoConfig.from_pretrained({str(folder)!r})
        AutoProcessor.from_pretrained({str(folder)!r})
        AutoImageProcessor.from_pretrained({str(folder)!r})
        report()
        AutoModel.from_config(config)
        report()
        """
    )
    assert float(seconds) <= 0.5
    assert heavy == "-"
    assert loaded == ["-", "-", "modeling_san+CLIP"]
