"""Audio entries of a data directory: checked before any work, read with errors that name them."""

import io
import os
import re
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile

from cmkt.corpus.audio import read_audio
from cmkt.errors import CmktError

UNREADABLE = 0.01  # share of the files that may be unreadable; they are skipped and named


@dataclass(frozen=True)
class Source:
    """One audio entry: `name`, its value in an scp, and where it stands, for messages."""

    name: str
    value: str
    file: str
    line: int | None

    @property
    def is_pipe(self) -> bool:
        """Whether the value is a command whose output is the audio."""
        return self.value.endswith("|")

    def error(self, what: object) -> CmktError:
        """Return an error that names the entry."""
        return CmktError(f"{self.name}: {what}", self.file, self.line)

    def check(self) -> tuple[int, int] | None:
        """Read the header: (samples, rate in Hz); None for a pipe.

        Raises:
            CmktError: missing, empty, truncated or not audio.
        """
        if self.is_pipe:
            return None
        remedy = "replace the file or drop its line"
        if not os.path.isfile(self.value):
            raise self.error(f"no such audio file: {self.value} (correct the path)")
        try:
            header = soundfile.info(self.value)
        except soundfile.LibsndfileError as error:
            raise self.error(f"not readable as audio: {self.value} ({remedy})") from error
        if header.frames == 0:
            raise self.error(f"empty audio file: {self.value} ({remedy})")
        # libsndfile takes what is there of a cut-off wav; its log has the length that was written.
        # Writers to a pipe put a very large length there, which means nothing.
        length = re.search(r"^data : (\d+) \(should be (\d+)\)", header.extra_info, re.MULTILINE)
        if length and int(length[2]) < int(length[1]) < 0x7FFFF000:
            raise self.error(f"truncated audio file: {self.value} ({remedy})")
        if header.format == "FLAC":  # its length stands in front: look for the end
            try:
                with soundfile.SoundFile(self.value) as stream:
                    stream.seek(header.frames - 1)
                    whole = len(stream.read(1)) == 1
            except soundfile.LibsndfileError:
                whole = False
            if not whole:
                raise self.error(f"truncated audio file: {self.value} ({remedy})")
        return header.frames, header.samplerate

    def read(self, channel: int) -> tuple[np.ndarray, int]:
        """Return one channel, (N,) float32, and its rate; a file with one has only that."""
        try:
            if self.is_pipe:
                return self._run(channel)
            return read_audio(
                self.value, None, channel if soundfile.info(self.value).channels > 1 else 0
            )
        except CmktError as error:
            raise self.error(error) from error

    def _run(self, channel: int) -> tuple[np.ndarray, int]:
        done = subprocess.run(self.value[:-1], shell=True, stdout=subprocess.PIPE, check=False)
        try:
            audio, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
            audio = audio[:, channel if audio.shape[1] > 1 else 0]
        except (soundfile.LibsndfileError, IndexError):
            audio = np.zeros(0)
        if done.returncode or not len(audio) or not np.isfinite(audio).all():
            raise CmktError(f"its command gave no audio (exit status {done.returncode})")
        return np.ascontiguousarray(audio), rate


def refuse_unreadable(errors: dict[str, str], total: int, what: str) -> None:
    """Accept single files that cannot be read, but not more than 1 % of a set.

    Args:
        errors: {name: why it cannot be read}.
        total: number of files.
        what: what they are, for the message.

    Raises:
        CmktError: the first of them, and how many there are.
    """
    if len(errors) > UNREADABLE * total:
        first = next(iter(errors.values()))
        raise CmktError(
            f"{first}; {len(errors)} of {total} {what} cannot be read, more than {UNREADABLE:.0%}"
        )


def check_pair(source: Source, form: tuple[int, int], reference: tuple[int, int]) -> None:
    """Refuse a reference whose (samples, rate) differ from its input's."""
    for quantity, ours, theirs in zip(("samples", "Hz"), form, reference, strict=True):
        if ours != theirs:
            raise source.error(
                f"the reference has {theirs} {quantity}, the input in wav.scp {ours} "
                "(make them equal or drop the utterance)"
            )
