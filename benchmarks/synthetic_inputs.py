"""Sounds and reactions whose right answer is known, for trained torch models."""

import re
from typing import Any

import numpy as np
import torch

RATE = 16000  # samples a second, of all the sound here
FRAME = 1024  # samples of a frame of CREPE
CENTS_OF_BIN = 20.0
FIRST_CENTS = 1997.3794084376191  # of bin 0, above 10 Hz
VOWELS = (
    # The first three formants of a man's vowels in Hz: Peterson and Barney, 1952.
    *((270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410)),
    *((730, 1090, 2440), (570, 840, 2410), (440, 1020, 2240), (300, 870, 2240)),
)
RINGS = ("c1ccccc1", "c1ccncc1", "c1cccs1", "C1CCCCC1", "C1CCOCC1", "c1ccc(F)cc1")
CHAINS = ("", "C", "CC", "CCC", "CC(C)", "COC", "CCOC", "C(C)")
# Reactants of two rests, and the product: textbook reactions that keep the rests.
REACTIONS = (
    "O=C(O){a}.N{b}>>O=C(N{b}){a}",
    "O=C(Cl){a}.N{b}>>O=C(N{b}){a}",
    "O=C(O){a}.O{b}>>O=C(O{b}){a}",
    "Br{a}.O{b}>>O({b}){a}",
    "CS(=O)(=O)O{a}.N{b}>>N({b}){a}",
    "O=C{a}.N{b}.[BH4-].[Na+]>>N({b})C{a}",
    "O=S(=O)(Cl){a}.N{b}>>O=S(=O)(N{b}){a}",
    "O=C=N{a}.N{b}>>O=C(N{b})N{a}",
)
TOKEN = re.compile(r"\[[^]]+]|Br|Cl|>>|[A-Za-z]|[0-9]|[()=#.]")


def tones(count: int, seed: int) -> tuple[Any, np.ndarray]:
    """Frames of tones with harmonics and noise, and their pitches.

    Args:
      count: number of tones.
      seed: seed of pitches, harmonics, phases and noise.

    Returns:
      Frames (count, 1024), each of mean 0 and standard deviation 1 as the model wants
      them, and pitches in cents above 10 Hz (count,).
    """
    rng = np.random.default_rng(seed)
    frequency = np.exp(rng.uniform(np.log(60), np.log(900), count))  # Hz
    times = np.arange(FRAME) / RATE  # seconds
    frames = np.zeros((count, FRAME))
    for harmonic in range(1, 11):
        height = rng.uniform(0.2, 1, (count, 1)) / harmonic
        phase = rng.uniform(0, 2 * np.pi, (count, 1))
        audible = (harmonic * frequency < RATE / 2)[:, None]
        angle = 2 * np.pi * harmonic * frequency[:, None] * times + phase
        frames += audible * height * np.sin(angle)
    frames += rng.normal(0, 0.05, frames.shape)
    frames -= frames.mean(1, keepdims=True)
    frames /= frames.std(1, keepdims=True)
    cents = 1200 * np.log2(frequency / 10)
    return torch.tensor(frames, dtype=torch.float32), cents


def voices(speakers: range, utterances: int, seed: int) -> Any:
    """Vowels by synthetic speakers, as mel spectrograms.

    A speaker has a pitch, a length of the vocal tract, a slope of the spectrum and
    breath; an utterance is a melody of eight vowels.

    Args:
      speakers: seeds of the speakers.
      utterances: number of utterances of each.
      seed: seed of the utterances.

    Returns:
      (speakers * utterances, 160, 40), speaker by speaker.
    """
    from scipy.signal import lfilter
    from transformers import audio_utils

    filters = audio_utils.mel_filter_bank(
        201, 40, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney"
    )
    window = np.hanning(401)[:-1]
    spectrograms = []
    for speaker in speakers:
        traits = np.random.default_rng(speaker)
        pitch = np.exp(traits.uniform(np.log(85), np.log(260)))  # Hz
        stretch = traits.uniform(0.85, 1.25)  # of the formants
        slope, breath = traits.uniform(0.7, 0.97), traits.uniform(0, 0.1)
        for utterance in range(utterances):
            rng = np.random.default_rng([seed, speaker, utterance])
            sound = []
            for vowel in rng.integers(len(VOWELS), size=8):
                glide = np.linspace(*rng.uniform(0.9, 1.1, 2), 3200)
                phase = np.cumsum(pitch * glide / RATE) + rng.uniform()
                pulses = np.diff(np.floor(phase), prepend=0.0)
                source = pulses + breath * rng.normal(size=3200)
                vowel_sound = lfilter([1 - slope], [1, -slope], source)
                for formant in VOWELS[vowel]:
                    radius = np.exp(-np.pi * (60 + formant / 20) / RATE)
                    angle = 2 * np.pi * min(formant * stretch, 7500) / RATE
                    poles = [1, -2 * radius * np.cos(angle), radius**2]
                    vowel_sound = lfilter([sum(poles)], poles, vowel_sound)
                sound.append(vowel_sound)
            wave = np.concatenate(sound)  # (25600,)
            wave *= 10 ** (-30 / 20) / np.sqrt(np.mean(wave**2))  # as the package: dBFS
            spectrogram = audio_utils.spectrogram(
                wave, window, 400, 160, power=2.0, mel_filters=filters
            )
            spectrograms.append(spectrogram.T[:160])
    return torch.tensor(np.stack(spectrograms), dtype=torch.float32)


def reactions(
    vocabulary: list[str], count: int, seed: int, length: int = 56
) -> tuple[dict[str, Any], Any]:
    """Reactions of `REACTIONS` with some tokens masked.

    Args:
      vocabulary: tokens by their number.
      count: number of reactions.
      seed: seed of the rests and of the masks.
      length: tokens of each, padded.

    Returns:
      The arguments of the model, and the tokens (count, length) that were masked, -1
      where none was.
    """
    rng = np.random.default_rng(seed)
    numbers = {token: i for i, token in enumerate(vocabulary)}
    ids = np.full((count, length), numbers["[PAD]"])
    truth = np.full((count, length), -1)
    for row in range(count):
        rests = [rng.choice(CHAINS) + rng.choice(RINGS) for _ in "ab"]
        text = rng.choice(REACTIONS).format(a=rests[0], b=rests[1])
        tokens = ["[CLS]", *TOKEN.findall(text), "[SEP]"][:length]
        ids[row, : len(tokens)] = [numbers[token] for token in tokens]
        masked = 1 + np.flatnonzero(rng.uniform(size=len(tokens) - 2) < 0.15)
        truth[row, masked] = ids[row, masked]
        ids[row, masked] = numbers["[MASK]"]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor((ids != numbers["[PAD]"]).astype(np.int64)),
    }, torch.tensor(truth)
