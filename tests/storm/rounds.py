"""Rounds of a storm: a calm training, the same one under faults, and what differs at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from tests.conftest import write_image_folder
from tests.storm.compare import differences
from tests.storm.compare_mlflow import mlflow_differences
from tests.storm.faults import After, Fault, NotMade, Scene
from tests.storm.runner import Plan, StormError, Training
from tests.storm.services import Services
from tests.storm.table import Outcome, Tally
from train.checkpoint import CheckpointStore, load_checkpoint

NUM_CLASSES, IMAGES_A_CLASS = 4, 60
GLOBAL_BATCH_SIZE = 16
STEPS_PER_EPOCH = NUM_CLASSES * IMAGES_A_CLASS // GLOBAL_BATCH_SIZE
STEPS_A_FAULT = 26
PACE_SECONDS = 0.08  # after each step of a stormy run
CALM_SECONDS, RECOVER_SECONDS, END_SECONDS = 600.0, 240.0, 600.0
STEPS_WITHOUT_HARM = 40  # then a fault that must end a start did not

RECIPE = """
data: {{path: {data}, loader: {loader}, num_workers: 1, global_batch_size: 16, grad_accum_steps: 2, resolution: 32}}
model: {{library: timm, name: test_resnet, dropout: 0.1}}
optimizer: {{name: sgd, peak_lr: 0.1, clip: {{kind: norm, limit: 5.0}}, loss_spike: {{action: skip}}}}
loss: {{label_smoothing: 0.1}}
augmentation: {{mixup: 0.2, cutmix: 1.0, random_erasing: 0.2}}
ema: {{decay: 0.95}}
schedule:
  phases: [{{kind: one_cycle, epochs: {cycle}}}, {{kind: plateau, epochs: {plateau}, initial_lr_fraction: 0.05, patience: 0}}]
  early_stopping: {{patience: 1000}}
validation: {{batch_size: 10, views: {{raw: {{weights: model}}}}}}
precision: {{mode: fp32}}
checkpoint: {{keep_last: 2, every_steps: 5, every_minutes: 0.05}}
preemption: {{hang_seconds: 15}}
run: {{log_every_steps: 2, preflight: false, seed: {seed}}}
"""  # noqa: E501


def build_data(folder: Path) -> Path:
    """A small data set of stripes, in the format that every loader reads."""
    source = write_image_folder(folder / "source", NUM_CLASSES, IMAGES_A_CLASS, 11)
    (source / "val" / "class_0" / "000.jpg").unlink()  # an odd number: the last validation batch is short
    prepare(open_source(source), PrepareOptions(out=folder / "data", num_workers=1, progress=False))
    return folder / "data"


def installed_loaders() -> list[str]:
    found = ["reference"]
    if importlib.util.find_spec("ffcv"):
        found.append("ffcv")
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        found.append("dali")
    return found


@dataclass
class Round:
    """One training, calm and stormy."""

    folder: Path
    data: Path
    loader: str
    seed: int
    faults: list[Fault]
    services: Services
    tally: Tally
    say: Callable[[str], None]
    until: float = math.inf  # by the monotonic clock: no fault is made later

    def __post_init__(self) -> None:
        self.chooser = random.Random(self.seed)
        self.num_epochs = max(3, -(-len(self.faults) * STEPS_A_FAULT // STEPS_PER_EPOCH))
        self.num_steps = self.num_epochs * STEPS_PER_EPOCH
        # The loss of one rank is not a number in some steps, in the calm run, too.
        self.nan_steps = sorted(self.chooser.sample(range(3, self.num_steps), 2))
        self.nan_rank = self.chooser.randrange(2)
        self.left: list[Fault] = []  # those for which the training was too short

    def run(self) -> None:
        """Both trainings and the comparison; outcomes go to the tally."""
        self.folder.mkdir()
        num_before = len(self.tally.outcomes)
        self.say(
            f"{self.folder.name}: {self.loader}, {self.num_steps} steps, {len(self.faults)} faults, "
            f"loss of rank {self.nan_rank} is NaN at {' and '.join(map(str, self.nan_steps))}"
        )
        began = time.monotonic()
        with self._training("calm", 0.0, ("tracking.mlflow=false",), {}) as calm:
            calm.launch()
            calm.run_to_the_end(CALM_SECONDS)
        self.say(f"  the calm run took {time.monotonic() - began:.1f} s")
        services = self.services
        words, variables = services.words(self.folder.name), services.variables
        with (
            services.disk(self.folder / "runs"),
            self._training("stormy", PACE_SECONDS, words, variables) as stormy,
        ):
            try:
                self._weather(stormy)
            except Exception as error:
                if not isinstance(error, StormError):
                    traceback.print_exc()
                    error = StormError(f"the storm itself failed: {type(error).__name__}: {error}")
                self.tally.faults_of_rounds.append(f"{self.folder.name}: {error}")
                self.say(f"  NOT SURVIVED: {error}")
                stormy.abort()
            self.tally.num_starts += stormy.num_starts
            self.tally.num_steps += stormy.step
            self.tally.first_step_seconds += stormy.first_step_seconds()
        self.tally.loaders.append(self.loader)
        self._judge(calm, stormy, self.tally.outcomes[num_before:])

    @contextlib.contextmanager
    def _training(
        self, name: str, pace: float, words: tuple[str, ...], variables: dict[str, str]
    ) -> Iterator[Training]:
        recipe = self.folder / f"{name}.yaml"
        plateau = max(1, self.num_epochs // 3)
        text = RECIPE.format(
            data=self.data,
            loader=self.loader,
            cycle=self.num_epochs - plateau,
            plateau=plateau,
            seed=self.seed,
        )
        recipe.write_text(text)
        nan = {"STORM_NAN": f'{{"{self.nan_rank}": {self.nan_steps}}}'}
        training = Training(Plan(self.folder, name, recipe, words, variables | nan, pace))
        try:
            yield training
        finally:
            training.kill()

    def _weather(self, training: Training) -> None:
        training.launch()
        for position, fault in enumerate(self.faults):
            left = len(self.faults) - position
            if time.monotonic() > self.until or not self._come_to_the_place(training, left):
                self.left = self.faults[position:]
                break
            self._inject(training, fault)
        training.set_pace(0.0)
        training.run_to_the_end(END_SECONDS)

    def _come_to_the_place(self, training: Training, num_left: int) -> bool:
        """Wait until the next fault is due; False where the training finished before."""
        scene = self._scene(training)
        attempts = training.num_starts
        begun = training.step
        room = self.num_steps - begun
        target = begun + self.chooser.randint(2, max(3, 2 * room // (num_left + 1)))
        # The last step is never waited for in vain: what comes after it is validation and the end.
        target = min(target, self.num_steps - 2)
        reached = scene.wait_for(lambda: training.step >= target, f"step {target}", RECOVER_SECONDS)
        if training.num_starts != attempts:
            raise StormError(f"the training ended without a fault: {training.last_words()}")
        if reached:
            time.sleep(self.chooser.choice((0.0, self.chooser.uniform(0.0, 1.0))))
        training.tend()
        return reached and training.step < self.num_steps and not training.is_finished

    def _scene(self, training: Training) -> Scene:
        return Scene(training, self.chooser, self.services, PACE_SECONDS)

    def _inject(self, training: Training, fault: Fault) -> None:
        scene = self._scene(training)
        training.forgive()
        struck = training.records.newest()
        scene.begin()
        outcome = Outcome(len(self.tally.outcomes) + 1, fault.kind, "", scene.step)
        is_made = True
        try:
            outcome.words = fault.strike(scene)
            outcome.step = scene.step
            if fault.after is After.ON:
                self._see_it_go_on(scene, outcome)
            else:
                self._see_it_again(scene, outcome, fault, (0, 0) if struck is None else struck.key)
        except StormError as error:
            scene.said.append(str(error))
            raise
        except NotMade:
            is_made = False
        except BaseException:  # of the storm itself
            is_made = False
            raise
        finally:
            outcome.problem = "; ".join(scene.said)
            if is_made:
                self.tally.outcomes.append(outcome)
                self.say("  " + outcome.line())

    def _see_it_again(self, scene: Scene, outcome: Outcome, fault: Fault, struck: tuple[int, int]) -> None:
        training = scene.training

        def is_back() -> bool:
            newest = training.records.newest()
            if newest is None:
                return False
            return newest.key > struck or newest.last > scene.step + STEPS_WITHOUT_HARM

        if not scene.wait_for(is_back, "the next step after the fault", RECOVER_SECONDS):
            return  # it finished
        outcome.seconds = time.monotonic() - scene.began
        attempts = training.records.attempts()
        before = [attempt for attempt in attempts if attempt.key <= struck]
        after = [attempt for attempt in attempts if attempt.key > struck]
        if not after:
            outcome.words += " (which the training did not notice)"
            return
        reached = max((attempt.last for attempt in before), default=-1) + 1
        outcome.resumed_from = after[0].first
        outcome.steps_lost = max(0, reached - after[0].first)
        if after[0].first > reached:
            scene.said.append(f"steps {reached} to {after[0].first - 1} were passed over")
        if fault.after is After.PLANNED and outcome.steps_lost:
            scene.said.append(f"a planned stop lost {outcome.steps_lost} steps")

    def _see_it_go_on(self, scene: Scene, outcome: Outcome) -> None:
        training = scene.training
        starts, key = training.num_starts, training.records.newest()
        step = training.step
        went_on = scene.wait_for(lambda: training.step >= step + 2, "two steps more", RECOVER_SECONDS)
        newest = training.records.newest()
        if training.num_starts != starts or (key and newest and newest.key != key.key):
            scene.said.append("the training ended, and had to be started again")
        if scene.next_step_at is None and not went_on:
            raise NotMade  # it had finished
        if scene.next_step_at is not None:
            outcome.seconds = scene.next_step_at - scene.began
        else:
            outcome.seconds = time.monotonic() - scene.began

    def _judge(self, calm: Training, stormy: Training, outcomes: list[Outcome]) -> None:
        found = differences(calm, stormy)
        if self.services.mlflow is not None:
            found += mlflow_differences(self.services.mlflow.uri, self.folder.name, stormy.folder)
        for sentence in found[:20]:
            self.say(f"  DIFFERENT: {sentence}")
        if found:
            self.tally.faults_of_rounds.append(f"{self.folder.name}: {'; '.join(found[:5])}")
            for outcome in outcomes:
                outcome.problem = outcome.problem or "the end differs from the calm run's"
        else:
            self.tally.num_equal += 1
            self.say("  the end is that of the calm run, bit for bit")
        self._count_nan(stormy, "; ".join(found[:1]))

    def _count_nan(self, stormy: Training, problem: str) -> None:
        """Steps with a NaN must have been skipped, all of them, and by both ranks: the ends are equal."""
        store = CheckpointStore(stormy.folder / "checkpoints")
        entries = store.manifest().checkpoints
        if not entries or problem:
            return
        skipped = int(load_checkpoint(store.folder / entries[-1].name)["updater"]["num_skipped"])
        if skipped < len(self.nan_steps):
            self.tally.faults_of_rounds.append(f"{self.folder.name}: only {skipped} NaN steps skipped")
        for step in self.nan_steps:
            number = len(self.tally.outcomes) + 1
            self.tally.outcomes.append(Outcome(number, "NaN in the loss of one rank", "", step))
