"""Teach the two speaker encoders who is talking: CAMPPlus for the flow, VoiceEncoder for T3.

Both learn to tell speakers apart by cosine. Four voices alone would be four points, told apart by anything at all; each
is also heard a little slower and lower, and a little faster and higher, as a speaker of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.xvector import CAMPPlus
from torch import Tensor, nn

from harness.mini.models import VOICES, build_s3gen, build_voice_encoder
from harness.mini.training import features
from harness.mini.training.run import Run, learning_rate
from harness.mini.training.speech import Corpus
from harness.mini.training.tokenizer import Speech

STEPS, PEAK_RATE = 500, 2e-3
PACES = (0.88, 1.0, 1.12)
CLIPS_PER_STEP, SCALE = 96, 16.0
PARTIAL = 160  # frames of one VoiceEncoder window


class Judge(nn.Module):
    """A direction for every speaker; logits are scaled cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(len(VOICES) * len(PACES), width))

    def forward(self, embeddings: Tensor) -> Tensor:
        return SCALE * F.linear(F.normalize(embeddings, dim=1), F.normalize(self.directions, dim=1))


def draw(speech: Speech, seconds: float) -> tuple[Tensor, Tensor]:
    """Clips [n, samples] of all voices at one pace, and the index of each clip's speaker."""
    pace = int(torch.randint(len(PACES), ()))
    wave, _, voices = speech.crops(CLIPS_PER_STEP, seconds)
    if PACES[pace] != 1.0:
        wave = F.interpolate(wave[:, None], scale_factor=1 / PACES[pace], mode="linear")[:, 0]
    loudness = 10 ** (torch.rand(len(wave), 1, device=wave.device) - 0.5)
    return (wave * loudness).clamp(-1, 1), voices * len(PACES) + pace


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train both encoders; writes run.path("speakers") with prefixes `speaker_encoder.` and `voice_encoder.`.

    Returns the share of held-out clips of 3 s whose speaker each encoder names.
    """
    torch.manual_seed(run.seed)
    seen, unseen = (Speech.of(part, run.device) for part in corpus.split())
    campplus, voice_encoder = build_s3gen().speaker_encoder.to(run.device), build_voice_encoder().to(run.device)
    judges = nn.ModuleDict({"campplus": Judge(192), "voice_encoder": Judge(256)}).to(run.device)
    modules = {"campplus": campplus, "voice_encoder": voice_encoder, "judges": judges}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.01)
    steps, first = run.steps(STEPS), run.resume("speakers", modules, {"adam": optimizer})
    for step in range(first, steps):
        clips, speakers = draw(seen, (2.0, 3.0, 4.0)[step % 3])
        logits = judge(campplus, voice_encoder, judges, clips)
        loss = sum(F.cross_entropy(answer, speakers) for answer in logits.values())
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_RATE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            run.log("speakers", step, loss=loss.item(), **shares(logits, speakers))
    state = {f"speaker_encoder.{name}": t for name, t in campplus.state_dict().items()}
    run.save("speakers", state | {f"voice_encoder.{name}": t for name, t in voice_encoder.state_dict().items()})

    for module in modules.values():
        module.eval()
    trials = []
    with torch.no_grad():
        for _ in range(6):
            clips, speakers = draw(unseen, 3.0)
            trials.append(shares(judge(campplus, voice_encoder, judges, clips), speakers))
    return {name: sum(trial[name] for trial in trials) / len(trials) for name in trials[0]}


def judge(campplus: CAMPPlus, voice_encoder: nn.Module, judges: nn.ModuleDict, clips: Tensor) -> dict[str, Tensor]:
    """Both encoders' speaker logits for the clips; VoiceEncoder hears one random window of 1.6 s."""
    mel = features.ve_mel(clips)
    at = int(torch.randint(mel.shape[1] - PARTIAL + 1, ()))
    return {
        "campplus": judges["campplus"](campplus(features.campplus_fbank(clips))),
        "voice_encoder": judges["voice_encoder"](voice_encoder(mel[:, at : at + PARTIAL])),
    }


def shares(logits: dict[str, Tensor], speakers: Tensor) -> dict[str, float]:
    """Share of right answers of each encoder."""
    return {name: (answer.argmax(1) == speakers).float().mean().item() for name, answer in logits.items()}
