"""Where the metrics of a run go: `metrics.jsonl`, TensorBoard, Weights & Biases."""

import math
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from lomo_jax.errors import ConfigError
from lomo_jax.run_files import Record


class Sink(Protocol):
    """Takes records."""

    def write(self, record: Record) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """Takes no more."""
        ...


class TensorBoard:
    """Event files for TensorBoard, on disk as soon as they are written."""

    def __init__(self, folder: Path, resumed: int | None) -> None:
        """Starts a file.

        Args:
          folder: Of the event files.
          resumed: The step after which a run goes on; what is in earlier files of later steps is of
            a process that was lost, and is not shown. None for a new run.
        """
        # Slow to import, and for the first process only. Not its SummaryWriter, which writes in a
        # thread: where the disk is full that ends, and the process waits for it for ever.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2
        self._summary, self._event = summary, proto.Event
        folder.mkdir(exist_ok=True)
        # Two processes of a run may start within a second, which is all that its name tells apart.
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if resumed is not None:
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._file.write_event(proto.Event(step=resumed + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Adds a point to the curve of each number."""
        for name, value in record.items():
            if name == "sample":
                summary = self._summary.text(name, value)
            elif isinstance(value, str):
                continue
            elif name not in ("step", "time", "resumed") and math.isfinite(value):
                summary = self._summary.scalar(name, value)
            else:
                continue
            self._file.write_event(
                self._event(wall_time=record["time"], step=record["step"], summary=summary)
            )
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one after each restart."""

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]) -> None:
        """Starts or resumes the run.

        Args:
          project: Its name.
          workdir: Of the run; holds the files of wandb and the run's identifier.
          config: Of the run, to be shown.

        Raises:
          ConfigError: The service refuses.
        """
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        folder = workdir / "wandb"
        folder.mkdir(exist_ok=True)
        identifier = folder / "run_id"
        if not identifier.exists():
            identifier.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=os.fspath(workdir),
                config=config,
                id=identifier.read_text(),
                resume="allow",
            )
        except wandb.Error as error:
            raise ConfigError(f"wandb: {str(error).splitlines()[0]}") from error
        # By the run's step, not by wandb's own count, which cannot go back when a run is resumed.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Logs a record."""
        self._run.log(record)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
