use super::HdPissaOps;
use burn_cubecl::CubeBackend;

impl HdPissaOps for CubeBackend {}
