//! A linear layer that computes the adapter's gradients without a tensor of the weight's size.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{Device, Tensor, module::linear};

use crate::HdPissaAdapter;
use crate::ops::adapter_linear;

/// Configuration of a [`HdPissaLinear`]: that of Burn's [`Linear`].
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hd_pissa::HdPissaLinearConfig;
///
/// let device = Device::flex();
/// let layer = HdPissaLinearConfig::new(8, 12).with_bias(false).init(&device);
/// assert_eq!(layer.forward(Tensor::<3>::ones([2, 5, 8], &device)).dims(), [2, 5, 12]);
/// ```
#[derive(Config, Debug)]
pub struct HdPissaLinearConfig {
    /// The size of the input features.
    pub d_input: usize,
    /// The size of the output features.
    pub d_output: usize,
    /// Whether a bias is added.
    #[config(default = true)]
    pub bias: bool,
    /// The initializer of weight and bias; Burn's default for a linear layer.
    #[config(
        default = "Initializer::KaimingUniform{gain: 1.0 / f64::sqrt(3.0), fan_out_only: false}"
    )]
    pub initializer: Initializer,
    /// The layout in which the weight is stored.
    #[config(default = "LinearLayout::Row")]
    pub layout: LinearLayout,
}

impl HdPissaLinearConfig {
    /// A layer without an adapter; [`apply_hd_pissa`](crate::HdPissaModule::apply_hd_pissa)
    /// attaches one.
    pub fn init(&self, device: &Device) -> HdPissaLinear {
        LinearConfig::new(self.d_input, self.d_output)
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .with_layout(self.layout)
            .init(device)
            .into()
    }
}

/// A linear layer that trains with HD-PiSSA at the cost of a frozen one: `y = x · W + bias`.
///
/// With an HD-PiSSA adapter on its `weight`, it computes the factors' gradients only from `x` and
/// the gradient of `y`. It makes no tensor of the weight's size, forward or backward. (A `bf16`
/// weight on Flex is an exception, because Flex converts it to `f32` for a product.) With another
/// reparameterization, or none, it works as Burn's [`Linear`]. It also has the parameter paths and
/// records of `Linear`.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct HdPissaLinear {
    /// Matrix of shape `[d_input, d_output]`, which may carry an adapter.
    pub weight: Param<Tensor<2>>,
    /// Vector of shape `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl HdPissaLinear {
    /// Takes over the parameters of a [`Linear`], with any adapter of its weight.
    pub fn from_linear(linear: Linear) -> Self {
        Self {
            weight: linear.weight,
            bias: linear.bias,
        }
    }

    /// Burn's [`Linear`] with the parameters of this layer, adapter included.
    pub fn into_linear(self) -> Linear {
        Linear {
            weight: self.weight,
            bias: self.bias,
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - input: `[.., d_input]`
    /// - output: `[.., d_output]`
    ///
    /// # Panics
    ///
    /// If the last dimension of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(Param::val);
        let Some(adapter) = self.weight.reparameterization::<HdPissaAdapter>() else {
            return dense(input, self.weight.val(), bias);
        };
        let weight = self.weight.base();
        let Some((a, b)) = adapter.frames() else {
            return dense(input, weight, bias);
        };
        let output = adapter_linear(input, weight, a, b, adapter.scale);
        match bias {
            Some(bias) => output + bias.unsqueeze(),
            None => output,
        }
    }
}

/// Burn's linear function, on an input whose leading dimensions are flattened to tokens. With more
/// than two dimensions, Burn copies the weight on some backends; [`adapter_linear`] never does.
fn dense<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let mut dims = input.dims();
    if D == 2 || input.shape().num_elements() == 0 {
        return linear(input, weight, bias);
    }
    let d_input = dims[D - 1];
    let tokens = dims[..D - 1].iter().product();
    dims[D - 1] = weight.dims()[1];
    linear(input.reshape([tokens, d_input]), weight, bias).reshape(dims)
}

impl From<Linear> for HdPissaLinear {
    fn from(linear: Linear) -> Self {
        Self::from_linear(linear)
    }
}

impl From<HdPissaLinear> for Linear {
    fn from(layer: HdPissaLinear) -> Self {
        layer.into_linear()
    }
}

impl ModuleDisplay for HdPissaLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.weight.lazy_shape().dims();
        let content = content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.bias.is_some());
        match self.weight.reparameterization::<HdPissaAdapter>() {
            Some(adapter) => {
                let hosted: Vec<usize> = adapter.shards.iter().map(|shard| shard.index).collect();
                let rank = adapter.shards.first().map_or(0, |shard| shard.a.dims()[1]);
                content
                    .add("rank", &rank)
                    .add_debug_attribute("shards", &hosted)
                    .add("num_shards", &adapter.num_shards)
            }
            None => content,
        }
        .optional()
    }
}
