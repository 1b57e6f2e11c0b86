"""What a user adds from outside the package, in few lines each: a function, method, data source, system or base."""

import inspect
import re

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call

import funlora_lab
from funlora_lab import LabError, Method, open_folder, open_run, preset, register, verify
from funlora_lab.adapters import METHODS, Adapters, functions, numbers_by_layer, stack, window
from funlora_lab.continual import prepare
from funlora_lab.data import SOURCES, Images
from funlora_lab.experiment import REGISTERED_TEXTS
from funlora_lab.store import Run, read_lines
from funlora_lab.systems import SYSTEMS, AdaptedBase, FineTune, build_unet
from funlora_lab.training import Runtime
from funlora_lab.unet import conv_layers
from funlora_lab.workbench.layers import AdaptedLayers

TOY = preset("smoke").but(
    multipliers=(1,), window="4-7", base_images=64, adapter_images=32, classifier_epochs=1, samples_per_class=4, chunk=4
)


@pytest.fixture(autouse=True)
def _registries():
    """Whatever a test registers goes when it ends."""
    registries = (METHODS, SYSTEMS, SOURCES, REGISTERED_TEXTS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def systems_of(experiment, home):
    return prepare(experiment, Runtime(), home)[1]


def forget(name):
    del METHODS[name], REGISTERED_TEXTS[name]


def sawtooth():
    @funlora_lab.function("sawtooth", rate=3e-2, frequency=lambda p: torch.linspace(0.1, 0.4, p))
    def sawtooth(A, B, ponderation, frequency):
        """W * F in the window's convolutions, F of a sawtooth."""
        z = frequency[..., None, None] * functions.product(A, B)[..., None, :, :]  # (K, p, O, I)
        return (ponderation[..., None, None] * (z - z.floor())).mean(-3)


def other_sawtooth():
    @funlora_lab.function("sawtooth", rate=3e-2, frequency=lambda p: torch.linspace(0.1, 0.4, p))
    def sawtooth(A, B, ponderation, frequency):
        z = frequency[..., None, None] * functions.product(A, B)[..., None, :, :]
        return (ponderation[..., None, None] * (z - z.round())).mean(-3)


def test_a_function_of_ones_own_is_a_few_lines_and_runs(home):
    sawtooth()
    e = TOY.but(method="sawtooth")
    run = open_run(e, "cpu", home=home)
    layers = list(conv_layers(run.network).values())[4:8]
    assert run.results["PPC"] == sum(layer.out_channels + layer.in_channels + 2 * e.functions for layer in layers)
    assert run.results["LA"] is not None
    for start in ("identity", "equal", "literal"):
        adapters = Adapters(run.network, e.but(start=start))
        for name, numbers in numbers_by_layer(stack([adapters.start(7)])).items():
            F, (O, I) = adapters.matrix(name, numbers), adapters.layers[name].weight.shape[:2]
            assert torch.allclose(F, torch.ones(1, O, I), atol=1e-6) == (start != "literal")
            assert adapters.bound(name) == min(O, I)
    text = (run.run.folder / "method.py").read_text()
    assert "def sawtooth" in text
    assert len(text.splitlines()) <= 15
    assert METHODS["sawtooth"].text == text
    assert (METHODS["sawtooth"].about, METHODS["sawtooth"].rate) == (
        "W * F in the window's convolutions, F of a sawtooth",
        3e-2,
    )
    assert verify(run.run).unchanged


def test_the_text_of_a_function_is_part_of_what_a_run_is(home):
    e, folders, adapters, bases = TOY.but(method="sawtooth"), [], [], []
    for define in (sawtooth, other_sawtooth, sawtooth):
        define()
        run = open_run(e, "cpu", home=home)
        folders.append(run.run.folder)
        adapters.append(run.generator.artefact_of(7).key)
        bases.append(run.generator.key)
        assert run.generator.artefact_of(7).inputs["method"]["text"] == METHODS["sawtooth"].text
    assert (len(set(folders)), len(set(adapters)), len(set(bases))) == (2, 2, 1)
    assert (folders[0], adapters[0]) == (folders[2], adapters[2])


def test_a_stored_run_opens_only_with_the_function_it_was_made_with(home):
    sawtooth()
    folder = open_run(TOY.but(method="sawtooth"), "cpu", home=home).run.folder

    def refused():
        with pytest.raises(LabError, match="sawtooth") as refusal:
            open_folder(folder, "cpu").samples(7)
        assert str(folder / "method.py") in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert str(refusal.value) in verify(Run.at(folder)).notes[0]

    forget("sawtooth")
    refused()
    with pytest.raises(LabError, match=r"^method=sawtooth: accepted is one of funlora, "):
        open_run(TOY.but(method="sawtooth"), "cpu", home=home)
    assert open_folder(folder, "cpu").results["method"] == "sawtooth"  # its numbers are there for any table
    other_sawtooth()
    refused()
    sawtooth()
    assert open_folder(folder, "cpu").samples(7).shape == (4, 1, 8, 8)


def test_what_cannot_be_registered_is_refused_in_one_sentence():
    def f(A, B, ponderation, slope):
        return functions.power_frozen(slope[..., :1] * A, B, ponderation)

    def ones(p):
        return torch.ones(p)

    with pytest.raises(LabError, match=r"^The method funlora is built in: .* another name\.$"):
        funlora_lab.function("funlora", slope=ones)(f)
    with pytest.raises(LabError, match=r"^The method kml is built in"):
        register(METHODS["kml"])
    for name in ("kml", "fine-tune"):
        with pytest.raises(LabError, match=f"^The method {name} is built in"):
            funlora_lab.system(name, "one more")(FineTune)
    with pytest.raises(LabError, match=r"^mine: first values are needed for slope, and given for none\.$"):
        funlora_lab.function("mine")(f)
    with pytest.raises(LabError, match=r"^mine: first values are needed for slope, and given for slope, jump\.$"):
        funlora_lab.function("mine", slope=ones, jump=ones)(f)
    with pytest.raises(LabError, match="source of <lambda> cannot be read"):
        funlora_lab.function("mine")(eval("lambda A, B, ponderation: A"))
    assert "mine" not in METHODS


def test_a_method_of_ones_own_is_handed_the_settings_that_it_names(home):
    def start(layer, settings, generator=None):
        return {"gain": torch.zeros(settings.rank, layer.out_channels)}

    def weight(W0, numbers, settings):
        return W0 * (1 + numbers["gain"].sum(1)[:, :, None, None, None])

    register(Method("gain", "a gain a channel", 1e-1, ("window", "rank"), window(), start, start, weight))
    run = open_run(TOY.but(method="gain", rank=2), "cpu", home=home)
    assert run.results["PPC"] == 2 * sum(layer.out_channels for layer in list(conv_layers(run.network).values())[4:8])
    assert run.row(7)[next(iter(run.adapters.layers)) + "/gain"].all()
    assert (run.run.folder / "method.py").read_text() == METHODS["gain"].text
    assert "def start" in METHODS["gain"].text
    assert verify(run.run).unchanged
    register(Method("gain", "a gain a channel", 1e-1, ("window",), window(), start, start, weight))
    with pytest.raises(AttributeError, match="the method does not name 'rank' among its settings"):
        systems_of(TOY.but(method="gain"), home)
    with pytest.raises(LabError, match=r"^rank=2: accepted is 1 for the method gain\.$"):
        systems_of(TOY.but(method="gain", rank=2), home)


def test_a_data_source_of_ones_own_is_a_few_lines_and_runs(home):
    @funlora_lab.data_source("stripes", "striped squares")
    def stripes(experiment, cache):
        def images(count, seed):
            labels = torch.arange(4).repeat(count)
            waves = torch.outer(labels + 1.0, torch.arange(8.0)).cos()[:, None, None, :].expand(-1, 1, 8, 8)
            noise = torch.randn(waves.shape, generator=torch.Generator().manual_seed(seed))
            return Images((127 + 100 * waves + 10 * noise).clamp(0, 255).byte(), labels)

        return ("one", "two", "three", "four"), images(20, 1), images(5, 2)

    assert len(inspect.getsource(stripes).splitlines()) <= 15
    run = open_run(TOY.but(data="stripes", split="2-1", method="shift"), "cpu", home=home)
    assert run.classes == ("one", "two", "three", "four")
    assert run.tasks == [[0, 1], [2], [3]]
    assert len(run.results["accuracy"]) == 3
    assert sum(map(sum, run.results["confusion"])) == 20


def distil():
    @funlora_lab.system("distil", "fine-tuning that stays near the network before it")
    class Distil(FineTune):
        """The loss adds the distance to the velocity of the network before the task, under its own labels."""

        before = None

        def learn(self, task):
            self.before, self.known = self.net, len(self.labels)
            super().learn(task)

        def loss(self, velocity, batch):
            if self.before is None:
                return super().loss(velocity, batch)
            t = batch.t[:, None, None, None]
            x = t * batch.x1 + (1 - t) * batch.x0
            new, old = velocity(batch.t, x), self.before(batch.t, x, batch.y % self.known)
            return ((new - batch.x1 + batch.x0).square() + (new - old).square()).mean((1, 2, 3))

        def classifier(self, seen):
            return ByVelocity(self.net)

    class ByVelocity(nn.Module):
        """Takes an image for the class whose velocity leads to it from the middle between it and no noise."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            t, classes = torch.full((len(x),), 0.5, device=x.device), len(self.net.label_emb.weight)
            labels = torch.arange(classes, device=x.device)[:, None].expand(-1, len(x))
            return torch.stack([-(self.net(t, x / 2, y) - x).square().mean((1, 2, 3)) for y in labels], 1)

    return Distil


def test_a_system_of_ones_own_overrides_the_loss_and_brings_its_classifier(home):
    kind, nets, keys = distil(), {}, {}
    assert len(inspect.getsource(distil).splitlines()) <= 40
    run = open_run(TOY.but(method="distil", split="6-4"), "cpu", home=home)
    assert {"own_LA", "own_AIA"} <= run.results.keys()
    assert all("own_average" in event for event in run.accuracies)
    assert (run.results["own_LA"], run.results["own_AIA"]) == (
        run.accuracies[-1]["own_average"],
        sum(event["own_average"] for event in run.accuracies) / 2,
    )
    assert {row["against"] for row in verify(run.run).differences} == {"what it was when first learned"}  # it forgets
    plain = open_run(TOY.but(method="fine-tune", split="6-4"), "cpu", home=home)
    assert "own_LA" not in plain.results
    for name, opened in (("own", run), ("plain", plain)):
        generators = [opened.generator_after(task) for task in (1, 2)]
        nets[name], keys[name] = [each.net.state_dict() for each in generators], {each.key for each in generators}
    assert not keys["own"] & keys["plain"]
    same = [
        all(torch.equal(own[name], usual[name]) for name in usual) for own, usual in zip(*nets.values(), strict=True)
    ]
    assert same == [True, False]  # task 1 has nothing to distil
    del SYSTEMS["distil"], REGISTERED_TEXTS["distil"]
    with pytest.raises(LabError, match=r"distil.*method\.py"):
        _ = open_folder(run.run.folder, "cpu").generator

    @funlora_lab.system("heir", "the same")
    class Heir(kind):
        pass

    assert "class Distil(FineTune)" in REGISTERED_TEXTS["heir"]  # the text of what it inherits is its own text
    assert (Heir.name, kind.name) == ("heir", "distil")


def bad_shape():
    @funlora_lab.function("flat", rate=3e-2)
    def flat(A, B, ponderation):
        return A  # (K, O), where F (K, O, I) is due


def bad_number():
    @funlora_lab.function("flat", rate=3e-2)
    def flat(A, B, ponderation):
        return 1.0


def bad_weight():
    def start(layer, settings, generator=None):
        return {"gain": torch.zeros(layer.out_channels)}

    def weight(W0, numbers, settings):
        return W0 * (1 + numbers["gain"].sum())

    register(Method("flat", "a gain", 1e-1, ("window",), window(), start, start, weight))


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (
            bad_shape,
            r"^The function flat returns \(4, 1\) for A \(4, 1\) and B \(4, 1\): .* F \(K, O, I\), \(4, 1, 1\)\.$",
        ),
        (bad_number, r"^The function flat returns a float for"),
        (
            bad_weight,
            r"^The method flat makes weights \(8, 8, 3, 3\) of 2 classes for .*: accepted are \(2, 8, 8, 3, 3\)\.$",
        ),
    ],
)
def test_a_method_of_a_wrong_shape_ends_in_one_sentence_before_anything_is_trained(define, words, tmp_path):
    define()
    with pytest.raises(LabError, match=words) as refusal:
        open_run(TOY.but(method="flat"), "cpu", home=tmp_path / "home")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("home/artefacts"))


def test_a_system_of_ones_own_may_be_the_adapted_base_with_another_loss(home):
    @funlora_lab.system("heavy", "adapters of another method, trained by a loss of their own")
    class Heavy(AdaptedBase):
        adapter = "shift"

        def loss(self, velocity, batch):
            return 2 * super().loss(velocity, batch)

    run, plain = (open_run(TOY.but(method=method), "cpu", home=home) for method in ("heavy", "shift"))
    assert run.adapters.method is METHODS["shift"]
    assert run.results["PPC"] == plain.results["PPC"]
    assert run.generator.key != plain.generator.key, "its text is part of every key"
    assert not set(run.generator.keys.values()) & set(plain.generator.keys.values())
    assert AdaptedLayers(run).values("change of the weights").index.tolist() == ["6", "7", "8", "9"]
    assert verify(run.run).unchanged


@pytest.fixture
def weights(tmp_path):
    """(the file of a network of TOY's configuration, that network)."""
    net = build_unet(TOY.but(seed=9), 6).eval().requires_grad_(False)
    for i, parameter in enumerate(net.parameters()):
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    safetensors.torch.save_file(net.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors", net


def test_weights_of_ones_own_are_the_base(weights, home):
    file, net = weights
    run = open_run(TOY.but(base_weights=str(file), base_images=0), "cpu", home=home)
    t, x, y = torch.rand(6), torch.randn(6, 1, 8, 8), torch.arange(6)
    assert torch.equal(run.network(t, x, y), net(t, x, y))
    row = {name: value[None] for name, value in run.row(7).items()}
    changed = run.adapters.velocity(row, 1)(t, x)
    expected = functional_call(net, run.adapters.merged(run.row(7)), (t, x, net.label_emb.weight.mean(0).expand(6, -1)))
    assert torch.allclose(changed, expected, atol=1e-5)
    assert not [line for line in read_lines(run.run.log_file) if line.get("stage") == "base"]
    trained = systems_of(TOY.but(base_weights=str(file)), home)
    trained.learn(0)
    assert trained.key != run.generator.key


@pytest.mark.parametrize(("method", "classes"), [("funlora", 6), ("fine-tune", 6), ("generative-multitask", 10)])
def test_weights_that_are_missing_or_do_not_fit_end_before_anything_is_written(method, classes, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    safetensors.torch.save_file(build_unet(TOY, classes + 1).state_dict(), wrong)
    faults = {
        tmp_path / "none.safetensors": r"^Cannot read {}: .*\.$",
        wrong: rf"^{{}} does not fit the experiment's network: label_emb.weight is \({classes + 1}, .*\.$",
    }
    for path, words in faults.items():
        with pytest.raises(LabError, match=words.format(re.escape(str(path)))):
            open_run(TOY.but(base_weights=str(path), base_images=0, method=method), "cpu", home=tmp_path / "home")
        assert not (tmp_path / "home").exists()
