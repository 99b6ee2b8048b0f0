"""Generation with an exported LFM2-VL: pictures and text in, text out."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnxruntime import InferenceSession, SessionOptions
from optimum.onnxruntime.modeling import ORTModel
from optimum.onnxruntime.utils import prepare_providers_and_provider_options
from optimum.utils.file_utils import find_files_matching_pattern
from transformers import AutoModelForImageTextToText, GenerationConfig, PretrainedConfig
from transformers.generation import GenerationMode

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import DECODER, EMBEDDING, ONNX_FOLDER, VISION
from optimum_lfm2.modeling import WARNINGS_OFF, ORTLfm2ForCausalLM
from optimum_lfm2.runtime.arguments import check_ids
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.files import generation_config_of, refused_graphs, save_session
from optimum_lfm2.runtime.parts import EmbeddedSession, Part, part_files, picture_features
from optimum_lfm2.runtime.request import REQUEST, Pictures, Request
from optimum_lfm2.runtime.rows import RowRunner
from optimum_lfm2.runtime.vision_checks import PICTURE, check_folder, check_pictures, check_type


HUB = ("subfolder", "revision", "force_download", "local_files_only", "cache_dir", "token")


PICTURES = "_pictures"  # the name of those of a call among the arguments that transformers' loop hands on


class ORTLfm2VlForConditionalGeneration(ORTLfm2ForCausalLM):
    """LFM2-VL on ONNX Runtime. It takes what transformers' `Lfm2VlProcessor` returns.

    Everything that `ORTLfm2ForCausalLM` promises of text holds with pictures: batching does not change answers, whether
    a row's neighbours have pictures or not. A chat goes on from the cache of an earlier turn, with the pictures of the
    whole chat or the new ones alone.
    """

    auto_model_class = AutoModelForImageTextToText

    def __init__(
        self,
        *,
        config: PretrainedConfig,
        session: InferenceSession,
        vision_session: InferenceSession,
        embedding_session: InferenceSession,
        use_io_binding: bool | None = None,
        generation_config: GenerationConfig | None = None,
        model_save_dir: str | Path | TemporaryDirectory | None = None,
    ) -> None:
        self._vision, self._embedding = Part(vision_session), Part(embedding_session)
        super().__init__(
            config=config,
            session=session,
            use_io_binding=use_io_binding,
            generation_config=generation_config,
            model_save_dir=model_save_dir,
        )
        if not self.can_use_cache:
            raise Lfm2Error(f"{self.path} has no cache inputs. Export the checkpoint again, or download it again.")

    def _connect(self) -> None:
        graph = EmbeddedSession(self.session, self.layout, self.device, self._file)
        self._graph = graph.with_embedding(self._embedding, self._text_config.vocab_size)
        self._rows = RowRunner(self._graph, self.layout.any_padding)

    @property
    def _others(self) -> tuple[Part, ...]:
        return self._vision, self._embedding

    def get_image_features(
        self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor, pixel_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Encode pictures.

        Args:
            pixel_values: float (tiles, patches, patch_size² * channels).
            spatial_shapes: integers (tiles, 2), the rows and columns of patches of each tile.
            pixel_attention_mask: integers (tiles, patches), 0 on padding.

        Returns:
            float32 (picture tokens, hidden_size), the tiles one after the other.

        Raises:
            Lfm2Error: the arguments do not fit each other or the model.
        """
        check_pictures(pixel_values, spatial_shapes, pixel_attention_mask, self.config.vision_config)
        return picture_features(self._vision, pixel_values, pixel_attention_mask, spatial_shapes)

    def forward(  # transformers reads the names of the arguments
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Lfm2Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: Lfm2Cache | None = None,
        pixel_values: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits of new tokens, and update the cache, as `ORTLfm2ForCausalLM.forward` does.

        Args:
            input_ids: integers (batch_size, sequence_length). The places of pictures have `image_token_id`.
            attention_mask: as for text.
            pixel_values, spatial_shapes, pixel_attention_mask: as `get_image_features` takes them: the pictures of all
                rows, in the order of their places. None leaves picture tokens as they are in the vocabulary.
            kwargs: none that a user gives. The other arguments are as for text.

        Raises:
            Lfm2Error: for what the text's raises, and where the pictures do not fill their places in `input_ids`.
        """
        if pixel_values is not None:
            check_ids(input_ids)
            features = self.get_image_features(pixel_values, spatial_shapes, pixel_attention_mask)  # type: ignore[arg-type]
            kwargs[PICTURES] = self._numbered(input_ids, features, input_ids.shape[1])
        return super().forward(
            input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict, cache, **kwargs
        )

    def _entered(self, ids: torch.Tensor, cache: Lfm2Cache | None, kwargs: dict[str, Any]) -> torch.Tensor:
        pictures = kwargs.get(PICTURES)
        assert cache is not None
        if pictures is None:
            cache.record.forget_pictures()
            return ids
        return cache.record.number_pictures(pictures.numbered, pictures.features, self._text_config.vocab_size)

    def _numbered(self, ids: torch.Tensor, features: torch.Tensor, new: int) -> Pictures:
        """Number the picture tokens: the i-th becomes vocab_size + i, the feature that takes its place.

        Args:
            ids: integers (batch_size, sequence_length).
            features: (picture tokens, hidden_size): of all tokens, or of the new ones alone where a cache has the rest.
            new: how many of the last columns are new.
        """
        places = ids == self.config.image_token_id
        if int(places.sum()) != len(features):
            places[:, : ids.shape[1] - new] = False
        if (count := int(places.sum())) != len(features):
            raise Lfm2Error(
                f"input_ids has {count} picture tokens, and the pictures fill {len(features)}. "
                "Give the processor the text and all its pictures at once."
            )
        numbered = ids.to(torch.int64).clone()
        numbered[places] = self._text_config.vocab_size + torch.arange(count, device=ids.device)
        return Pictures(features, numbered)

    def _understood(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        pixels, mask, shapes = (kwargs.pop(name, None) for name in PICTURE)
        kwargs = super()._understood(kwargs)
        ids, request = kwargs.get("inputs"), kwargs[REQUEST]
        if ids is None:
            return kwargs
        new = min(request.new, request.given)
        if pixels is not None:
            request.pictures = self._numbered(ids, self.get_image_features(pixels, shapes, mask), new)
        elif bool((ids[:, ids.shape[1] - new :] == self.config.image_token_id).any()):
            raise Lfm2Error(
                "input_ids has picture tokens, and there are no pictures. Pass all that the processor returns: "
                "generate(**processor(...))."
            )
        return kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if model_kwargs[REQUEST].pictures is not None and args and args[0] == GenerationMode.ASSISTED_GENERATION:
            raise Lfm2Error("Assisted generation does not take pictures yet. Leave the assistant out.")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Lfm2Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Lfm2Cache | None = None,
        _request: Request | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut the ids as for text, and add the pictures where the new tokens have places for them."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values, attention_mask, use_cache, logits_to_keep, cache, _request, **kwargs
        )
        if _request is not None:
            inputs[PICTURES] = _request.pictures_of(input_ids, inputs["input_ids"].shape[1])
        return inputs

    def _save_pretrained(self, save_directory: str | Path) -> None:
        for part in (self, self._vision, self._embedding):
            save_session(part, Path(save_directory) / ONNX_FOLDER)
        compat.spell_model_type(Path(save_directory), member_of(self.config).model_type)

    @classmethod
    def from_pretrained(cls, model_id: str | Path, *args: Any, **kwargs: Any) -> ORTLfm2VlForConditionalGeneration:
        """Load an exported folder, or export a checkpoint, as Optimum's classes do.

        Args:
            model_id: a folder, or an id of the Hub.
            args, kwargs: Optimum's arguments. `file_name` chooses the precision by the decoder's file, such as
                `decoder_model_merged_q4.onnx`. Its default is the file without a suffix, or the only one.

        Raises:
            Lfm2Error: a local folder is of another model, or its config.json is missing or wrong.
        """
        if (folder := Path(model_id)).is_dir() and not kwargs.get("config"):
            check_folder(folder, kwargs.get("subfolder") or "")
        return super().from_pretrained(model_id, *args, **kwargs)

    @classmethod
    def _export(cls, *args: Any, **kwargs: Any) -> ORTLfm2VlForConditionalGeneration:
        return ORTModel._export.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        file_name: str | None = None,
        generation_config: GenerationConfig | None = None,
        session_options: SessionOptions | None = None,
        provider: str = "CPUExecutionProvider",
        providers: Any = None,
        provider_options: Any = None,
        use_io_binding: bool | None = None,
        model_save_dir: str | Path | TemporaryDirectory | None = None,
        **kwargs: Any,
    ) -> ORTLfm2VlForConditionalGeneration:
        check_type(getattr(config, "model_type", None), model_id)
        hub = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
        where = {name: hub[name] for name in ("subfolder", "revision", "token") if name in hub}
        files = find_files_matching_pattern(model_id, r".*\.onnx$", glob_pattern="**/*.onnx", **where)
        if Path(model_id).is_dir():
            files = [file.relative_to(model_id) for file in files]
        if session_options is None:
            session_options = SessionOptions()
            session_options.log_severity_level = WARNINGS_OFF
        providers, provider_options = prepare_providers_and_provider_options(
            provider=provider, providers=providers, provider_options=provider_options
        )
        download = {name: value for name, value in hub.items() if name != "subfolder"}
        sessions = {}
        for part, file in part_files(files, file_name, model_id).items():
            path = cls._cached_file(model_id, file.name, subfolder=file.parent.as_posix(), **download)
            with refused_graphs(path):
                sessions[part] = InferenceSession(
                    path, providers=providers, provider_options=provider_options, sess_options=session_options
                )
        return cls(
            config=config,
            session=sessions[DECODER],
            vision_session=sessions[VISION],
            embedding_session=sessions[EMBEDDING],
            use_io_binding=use_io_binding,
            generation_config=generation_config or generation_config_of(model_id, hub.get("subfolder", ""), kwargs),
            model_save_dir=model_save_dir or Path(sessions[DECODER]._model_path).parent,
        )
