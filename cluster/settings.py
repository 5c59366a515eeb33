"""Settings of the service."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Settings(BaseModel):
    """The options of `python -m cluster serve`, and the arguments of `serve run cluster.serve:application`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="folder or hub id of the checkpoint")
    name: str = Field("depthvlm", description="that requests call the model by")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda, of each replica's model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the model")
    threads: PositiveInt = Field(1, description="of a replica on a CPU")
    max_batch_size: PositiveInt = Field(8, description="requests of a wave; 1: one by one")
    max_wait_ms: float = Field(10.0, ge=0, description="that a request waits for others to fill its wave")
    max_requests: PositiveInt = Field(32, description="of a replica, running or waiting; more are refused with 429")
    max_body_bytes: PositiveInt = Field(32 << 20, description="of a request, photos in base64 included")
    max_images: PositiveInt = Field(8, description="photos of a request")
    max_image_pixels: PositiveInt = Field(50_000_000, description="of a photo as sent")
    max_prompt_tokens: PositiveInt = Field(8192, description="of a request, photos included")
    max_answer_tokens: PositiveInt = Field(512, description="of an answer: the limit and the default")
    min_replicas: PositiveInt = Field(1, description="with a model each")
    max_replicas: PositiveInt = Field(1, description="with a model each; above min_replicas: by load")
    drain_seconds: PositiveInt = Field(60, description="that requests in flight have to end when the service stops")
