"""Pruned, shrunk and packed functions leave JAX: for any batch, as files, as ONNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxprune as jp
from tests.support.small_models import draw

pytestmark = [pytest.mark.full, pytest.mark.jax_api]

X = draw(0, 5, 16)
PARAMS = {"up": draw(1, 16, 64), "down": draw(2, 64, 16)}
NAMES = ("pruned", "shrunk", "packed")
names = pytest.mark.parametrize("name", NAMES)


def model(params, x):
    logits = jax.nn.relu(x @ params["up"]) @ params["down"]
    return jax.nn.softmax(logits.reshape(x.shape[0], 4, 4))


@functools.cache
def smaller(name):
    """Parameters and a batch to a result, and the parameters."""
    scores = jp.scores.magnitude(PARAMS)
    pruned = jp.prune(PARAMS, scores, 0.5)
    if name == "pruned":
        return model, pruned
    if name == "shrunk":
        return jp.shrink(model, PARAMS, [X], scores, 0.5)[:2]
    return jp.pack(model, pruned, X)[:2]


@names
@pytest.mark.parametrize("rows", ["5", "b"])
def test_it_is_exported_for_batches_of_one_size_or_of_any(name, rows):
    fn, params = smaller(name)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape(f"{rows}, 16"), X.dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    exported = export.export(jax.jit(fn))(shapes, shape)
    for count in (5,) if rows == "5" else (1, 7):
        x = draw(3, count, 16)
        expected = jax.jit(fn)(params, x)
        np.testing.assert_allclose(exported.call(params, x), expected, rtol=1e-5)


@pytest.mark.clients
@names
def test_it_is_written_and_read_back(name):
    pytest.importorskip("flatbuffers")
    fn, params = smaller(name)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 16"), X.dtype)
    # A file holds trees of JAX's own containers, so what is packed is closed over.
    written = export.export(jax.jit(lambda x: fn(params, x)))(shape).serialize()
    np.testing.assert_array_equal(
        export.deserialize(written).call(X), jax.jit(fn)(params, X)
    )


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "rows"), [("pruned", 5), ("pruned", "B"), ("shrunk", 5)]
)
def test_onnxruntime_computes_it(name, rows):
    # jax2onnx has functions of its own for those of jax.nn while it traces: a shrunk
    # function meets them where the batch is of another shape than it was shrunk with.
    jax2onnx = pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    fn, params = smaller(name)
    written = jax2onnx.to_onnx(lambda x: fn(params, x), [(rows, 16)])
    session = runtime.InferenceSession(written.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: np.asarray(X)})
    np.testing.assert_allclose(result, jnp.asarray(fn(params, X)), rtol=1e-4, atol=1e-5)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pruned", "shrunk"])
def test_litert_computes_it(name):
    tensorflow = pytest.importorskip("tensorflow")
    jax2tf = pytest.importorskip("jax.experimental.jax2tf")
    lite = tensorflow.lite
    fn, params = smaller(name)
    signature = [tensorflow.TensorSpec(X.shape, "float32")]
    converted = tensorflow.function(
        jax2tf.convert(lambda x: fn(params, x)),
        input_signature=signature,
        autograph=False,
    )
    converter = lite.TFLiteConverter.from_concrete_functions(
        [converted.get_concrete_function()], converted
    )
    interpreter = lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    [source], [sink] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(source["index"], np.asarray(X))
    interpreter.invoke()
    result = interpreter.get_tensor(sink["index"])
    np.testing.assert_allclose(result, fn(params, X), rtol=1e-4, atol=1e-5)
