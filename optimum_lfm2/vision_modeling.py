"""Generation with an exported LFM2-VL or LFM3-VL: pictures and text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

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
from optimum_lfm2.graph.tower import Medium, Tower
from optimum_lfm2.modeling import WARNINGS_OFF, ORTLfm2ForCausalLM
from optimum_lfm2.runtime.arguments import check_dtype, check_ids
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.files import generation_config_of, refused_graphs, save_session
from optimum_lfm2.runtime.parts import EmbeddedSession, Part, part_files, picture_features
from optimum_lfm2.runtime.request import REQUEST, Pictures, Request
from optimum_lfm2.runtime.rows import RowRunner
from optimum_lfm2.runtime.vision_checks import check_folder, check_shown, check_type, unfilled


HUB = ("subfolder", "revision", "force_download", "local_files_only", "cache_dir", "token")


PICTURES = "_pictures"  # the name of those of a call among the arguments that transformers' loop hands on


class VisionModel(ORTLfm2ForCausalLM):
    """What is the same for every vision tower. Its record says what a call shows.

    Everything that `ORTLfm2ForCausalLM` promises of text holds with pictures: batching does not change answers, whether
    a row's neighbours have pictures or not. A chat goes on from the cache of an earlier turn, with the pictures of the
    whole chat or the new ones alone.
    """

    LOADER: ClassVar[str]  # the class, as the records of the members that it loads name it
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
        self._tower: Tower = member_of(config).tower
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

    def shown(self, arguments: Mapping[str, Any]) -> dict[Medium, list[Any]]:
        """Return what a call shows: for each medium of which there is anything, the values of its arguments."""
        given = {medium: medium.given(arguments) for medium in self._tower.media}
        return {medium: values for medium, values in given.items() if any(value is not None for value in values)}

    def checked(self, shown: Mapping[Medium, Sequence[Any]]) -> dict[Medium, Mapping[str, torch.Tensor]]:
        """Return the inputs of the tower's graph by their names, for each medium that `shown` returns.

        Raises:
            Lfm2Error: its tensors do not fit each other or the model, or one is missing.
        """
        return {medium: check_shown(medium, given, self._tower, self.config) for medium, given in shown.items()}

    def features_of(self, shown: Mapping[Medium, Sequence[Any]]) -> dict[Medium, torch.Tensor]:
        """Encode what `shown` returns: float32 (tokens, hidden_size) each. Errors are those of `checked`."""
        return {
            medium: picture_features(self._vision, self._tower.pieces(one))
            for medium, one in self.checked(shown).items()
        }

    def places(self, ids: torch.Tensor, medium: Medium) -> torch.Tensor:
        """Tell which ids are places of a medium: a bool tensor of their shape."""
        return ids == getattr(self.config, medium.token)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Lfm2Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: Lfm2Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits of new tokens, and update the cache, as `ORTLfm2ForCausalLM.forward` does.

        Args:
            input_ids: integers (batch_size, sequence_length). The places of pictures have `image_token_id`.
            attention_mask: as for text.
            kwargs: the arguments of `media`: what all rows show, in the order of its places. Without them such tokens
                stay as they are in the vocabulary.

        Raises:
            Lfm2Error: for what the text's raises, and where the pictures do not fill their places in `input_ids`.
        """
        shown = self.shown(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in self._arguments}
        if shown:
            check_ids(input_ids)
            kwargs[PICTURES] = self._numbered(input_ids, self.features_of(shown), input_ids.shape[1])
        return super().forward(
            input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict, cache, **kwargs
        )

    @property
    def _arguments(self) -> list[str]:
        return [name for medium in self._tower.media for name in medium.arguments]

    def _entered(self, ids: torch.Tensor, cache: Lfm2Cache | None, kwargs: dict[str, Any]) -> torch.Tensor:
        pictures = kwargs.get(PICTURES)
        assert cache is not None
        if pictures is None:
            cache.record.forget_pictures()
            return ids
        return cache.record.number_pictures(pictures.numbered, pictures.features, self._text_config.vocab_size)

    def _numbered(self, ids: torch.Tensor, features: Mapping[Medium, torch.Tensor], new: int) -> Pictures:
        """Number the places: the i-th becomes vocab_size + i, the feature that takes it. Media follow each other.

        Args:
            ids: integers (batch_size, sequence_length).
            features: of each medium (tokens, hidden_size): of all places, or of the new ones alone where a cache has
                the rest.
            new: how many of the last columns are new.
        """
        numbered, first = ids.to(torch.int64).clone(), self._text_config.vocab_size
        for medium, rows in features.items():
            places = self.places(ids, medium)
            if int(places.sum()) != len(rows):
                places[:, : ids.shape[1] - new] = False
            if (count := int(places.sum())) != len(rows):
                raise Lfm2Error(unfilled(medium, count, len(rows)))
            numbered[places] = first + torch.arange(count, device=ids.device)
            first += count
        return Pictures(torch.cat(list(features.values())), numbered)

    def _understood(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        shown = self.shown({name: kwargs.pop(name, None) for name in self._arguments})
        kwargs = super()._understood(kwargs)
        ids, request = kwargs.get("inputs"), kwargs[REQUEST]
        if ids is None:
            return kwargs
        new = min(request.new, request.given)
        for medium in self._tower.media:
            if medium not in shown and bool(self.places(ids[:, ids.shape[1] - new :], medium).any()):
                raise Lfm2Error(
                    f"input_ids has {medium.name} tokens, and there are no {medium.name}s. Pass all that the processor "
                    "returns: generate(**processor(...))."
                )
        if shown:
            request.pictures = self._numbered(ids, self.features_of(shown), new)
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
    def from_pretrained(cls, model_id: str | Path, *args: Any, **kwargs: Any) -> VisionModel:
        """Load an exported folder, or export a checkpoint, as Optimum's classes do.

        Args:
            model_id: a folder, or an id of the Hub.
            args, kwargs: Optimum's arguments. `file_name` chooses the precision by the decoder's file, such as
                `decoder_model_merged_q4.onnx`. Its default is the file without a suffix, or the only one.

        Raises:
            Lfm2Error: a local folder is of another model, or its config.json is missing or wrong.
        """
        if (folder := Path(model_id)).is_dir() and not kwargs.get("config"):
            check_folder(folder, cls.LOADER, kwargs.get("subfolder") or "")
        return super().from_pretrained(model_id, *args, **kwargs)

    @classmethod
    def _export(cls, *args: Any, **kwargs: Any) -> VisionModel:
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
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> VisionModel:
        check_type(getattr(config, "model_type", None), cls.LOADER, model_id)
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
        model = cls(
            config=config,
            session=sessions[DECODER],
            vision_session=sessions[VISION],
            embedding_session=sessions[EMBEDDING],
            use_io_binding=use_io_binding,
            generation_config=generation_config or generation_config_of(model_id, hub.get("subfolder", ""), kwargs),
            model_save_dir=model_save_dir or Path(sessions[DECODER]._model_path).parent,
        )
        check_dtype(dtype, model.dtype)
        return model


class ORTLfm2VlForConditionalGeneration(VisionModel):
    """LFM2-VL on ONNX Runtime. It takes what transformers' `Lfm2VlProcessor` returns, as `VisionModel` says."""

    LOADER = "ORTLfm2VlForConditionalGeneration"

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
        (pictures,) = self._tower.media
        return self.features_of({pictures: (pixel_values, pixel_attention_mask, spatial_shapes)})[pictures]

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
        """Run `VisionModel.forward` with pictures, as `get_image_features` takes them."""
        kwargs |= {
            "pixel_values": pixel_values,
            "spatial_shapes": spatial_shapes,
            "pixel_attention_mask": pixel_attention_mask,
        }
        return super().forward(
            input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict, cache, **kwargs
        )


class ORTLfm3VlForConditionalGeneration(VisionModel):
    """LFM3-VL on ONNX Runtime. It takes what transformers' `Lfm3VlProcessor` returns, as `VisionModel` says.

    A call may show pictures, videos, or both. The places of videos have `video_token_id`.
    """

    LOADER = "ORTLfm3VlForConditionalGeneration"

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode pictures.

        Args:
            pixel_values: float (patches, channels * temporal_patch_size * patch_size²), those of the pictures one after
                the other, block by block as the processor gives them.
            image_grid_thw: integers (pictures, 3), the pairs of frames, rows and columns of patches of each picture.

        Returns:
            float32 (picture tokens, hidden_size), the pictures one after the other.

        Raises:
            Lfm2Error: the arguments do not fit each other or the model.
        """
        pictures, _ = self._tower.media
        return self.features_of({pictures: (pixel_values, image_grid_thw)})[pictures]

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode videos. Arguments, result and errors are those of `get_image_features`."""
        _, videos = self._tower.media
        return self.features_of({videos: (pixel_values_videos, video_grid_thw)})[videos]

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
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `VisionModel.forward` with pictures and videos, as the methods above take them."""
        kwargs |= {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
        }
        return super().forward(
            input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, return_dict, cache, **kwargs
        )


# By the names that the members' records have.
VISION_CLASSES = {one.LOADER: one for one in (ORTLfm2VlForConditionalGeneration, ORTLfm3VlForConditionalGeneration)}
