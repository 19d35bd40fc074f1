"""dipole's library: data windows, denoisers, samplers, planning and control. It never imports a simulator."""
